"""What the servers of `vs_llama_cpp.py` are asked, part by part, and what of it is written down.

**Cold**: a server sees each prompt once.  **Hot**: the same prompts once more.  Answers are greedy, those of a part of one length.
Knows nothing about which server it is.
"""

import asyncio
import calendar
import configparser
import difflib
import json
import optparse
import random
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from edits import ANSWER_TOKENS, MODULES, some_edits

from helix_gateway.cli.load.level import Concurrency, Level, Limit
from helix_gateway.cli.load.prompts import Prompt, RequestOptions, synthetic
from helix_gateway.cli.load.summary import summarise
from helix_gateway.cli.openai_client import OpenAIClient

DATA = Path(__file__).resolve().parent / "data" / "spec_bench_dev.jsonl"
EDITED = (*MODULES, calendar, configparser, difflib, optparse, tarfile, zipfile)
"""Enough functions that no level is asked what another was."""
PREFILL_TOKENS = (128, 512, 2048, 6000)
LONG_TOKENS, LONG_ANSWER_TOKENS, LONG_REQUESTS = (2048, 6000), 64, 2
"""By default: of a prompt; of an answer; and how many of each length."""
SHARED_TOKENS, SHARERS, QUESTION_WORDS = 1500, 16, 24
"""Of one beginning: its length; by default, how many requests share it; and what each adds."""


@dataclass(frozen=True)
class Visit:
    """One round's client of one server."""

    client: OpenAIClient
    model: str
    options: Any
    """The command line's: streams, requests of a level, tokens of an answer; lengths of prompts; those who share one."""
    number: int
    """Of the round; each has prompts of its own, the same for all servers."""
    predicts: bool
    """Whether the server is told what it will answer, too."""

    def body(self, prompt, tokens=None, **more):
        """The JSON of a request; ``more`` are fields beside the usual ones."""
        asked = RequestOptions(self.model, max_tokens=tokens or self.options.tokens, ignore_eos=True)
        return msgspec.json.encode(msgspec.json.decode(asked.body(prompt)) | more)

    async def ask(self, bodies, streams):
        """All of them, so many at once: the summary.

        Raises:
            RuntimeError: a request failed.
        """
        level = Level(self.client, "chat", iter(bodies), Concurrency(streams), Limit(requests=len(bodies)))
        await level.run()
        summary = summarise(level)
        if summary.failed:
            raise RuntimeError(f"requests failed: {summary.errors}")
        return summary

    async def text(self, body):
        """The answer to one request."""
        async with aclosing(self.client.stream("chat", body)) as pieces:
            return "".join([piece.text async for piece in pieces])


def shown(summary):
    """What is kept of a level."""
    return {
        "tokens_per_s": summary.output_tokens_per_s,
        "ttft_ms": summary.ttft_s.p50 * 1e3,
        "gap_ms": summary.gap_s.p50 * 1e3,
    }


def spec_bench(seed):
    """All prompts in an order of their own, none of them twice."""
    lines = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    prompts = [Prompt(line["messages"]) for line in lines]
    random.Random(seed).shuffle(prompts)
    return prompts


def story(seed, words):
    """So many words, about a token each; no two seeds have a beginning in common."""
    told = [f"{seed}:"]
    for prompt in synthetic(seed):
        told += prompt.text.split()
        if len(told) >= words:
            return " ".join(told[:words])
    raise AssertionError("synthetic prompts never end")


def question(text):
    return Prompt([{"role": "user", "content": text}])


def shares(prompts, options):
    """Each level's own prompts: (streams, prompts)."""
    taken = 0
    for streams in options.streams:
        count = max(options.requests, 2 * streams)
        yield streams, [prompts[place % len(prompts)] for place in range(taken, taken + count)]
        taken += count


async def cold_and_hot(visit, prompts, streams, tokens=None):
    """The same prompts twice; tokens: of an answer, where they are not those of the command line."""
    bodies = [visit.body(prompt, tokens) for prompt in prompts]
    return {heat: shown(await visit.ask(bodies, streams)) for heat in ("cold", "hot")}


async def levels(visit):
    """Spec-Bench's prompts: {streams: {"cold": figures, "hot": figures}}."""
    prompts = spec_bench(visit.number)
    return {str(streams): await cold_and_hot(visit, own, streams) for streams, own in shares(prompts, visit.options)}


async def edits(visit):
    """Functions to be written again: {streams: figures as of `levels`}, and "predicted" where the server can make use of it.

    A prediction is the server's own answer.  Those requests have a cache of their own (``cache_salt``), in which neither
    prompts nor answers of the other ones are, so they stand beside the cold.
    """
    count = sum(max(visit.options.requests, 2 * streams) for streams in visit.options.streams)
    dice = random.Random(visit.number)
    prompts = [Prompt(edit.messages) for edit in some_edits(count, dice, EDITED)]
    figures = {}
    for streams, own in shares(prompts, visit.options):
        figures[str(streams)] = await cold_and_hot(visit, own, streams, ANSWER_TOKENS)
        if visit.predicts:
            figures[str(streams)]["predicted"] = await predicted(visit, own, streams)
    return figures


async def predicted(visit, prompts, streams):
    """With right predictions."""
    answers = await asyncio.gather(*(visit.text(visit.body(prompt, ANSWER_TOKENS)) for prompt in prompts))
    bodies = [
        visit.body(prompt, ANSWER_TOKENS, prediction={"type": "content", "content": answer}, cache_salt="predicted")
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return shown(await visit.ask(bodies, streams))


async def prefill(visit):
    """Prompt tokens a second of one new prompt at a time: {length: figure}."""
    figures = {}
    for place, length in enumerate(visit.options.prefill_tokens):
        prompt = question(story(1000 * visit.number + place, length))
        summary = await visit.ask([visit.body(prompt, tokens=1)], 1)
        figures[str(length)] = summary.prompt_tokens / summary.ttft_s.p50
    return figures


async def long(visit):
    """Long prompts, each new, one after another, with a short answer: {length: figures}."""
    figures = {}
    for length in visit.options.long_tokens:
        first = 1000 * visit.number + length
        prompts = [question(story(first + place, length)) for place in range(LONG_REQUESTS)]
        summary = await visit.ask([visit.body(prompt, LONG_ANSWER_TOKENS) for prompt in prompts], 1)
        figures[str(length)] = shown(summary)
    return figures


async def prefix(visit):
    """Many at once that share a long beginning: new to the server ("cold"), and other questions over it again ("hot")."""
    first, count = 1000 * visit.number, visit.options.sharers
    shared, figures = story(first, SHARED_TOKENS), {}
    for place, heat in enumerate(("cold", "hot")):
        ends = [story(first + 1 + place * count + i, QUESTION_WORDS) for i in range(count)]
        figures[heat] = shown(await visit.ask([visit.body(question(f"{shared}\n\n{end}")) for end in ends], count))
    return figures


def one_alone(_options):
    return 1


def most_streams(options):
    return max(options.streams)


def all_sharers(options):
    return options.sharers


@dataclass(frozen=True)
class Part:
    """One kind of load; each has a server of its own, so that none finds what another has left."""

    key: str
    """What its figures are filed under."""
    measure: Callable
    parallel: Callable = one_alone
    """The most requests at once, by the command line's options."""
    context: int = 8192
    """Tokens of one request."""

    async def visit(self, url, setting, options, number):
        """Its figures of one round."""
        async with OpenAIClient(url, timeout_s=600) as client:
            model = await client.only_model(None)
            return await self.measure(Visit(client, model, options, number, setting.predicts))


PARTS = {
    "levels": Part("levels", levels, parallel=most_streams, context=2048),
    "edits": Part("edits", edits, parallel=most_streams, context=2048),
    "prefill": Part("prefill_tokens_per_s", prefill),
    "long": Part("long", long),
    "prefix": Part("prefix", prefix, parallel=all_sharers, context=2048),
}
