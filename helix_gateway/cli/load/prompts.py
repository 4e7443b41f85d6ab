"""What a load asks: prompts from a file, or made-up ones whose lengths are spread as those of real chats.

Knows nothing about servers, nor about when requests are sent.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec

from helix_gateway.cli.openai_client import Api
from helix_gateway.core.errors import HelixError

SHAREGPT_PROMPT_TOKENS = 161
"""Mean length of ShareGPT's prompts (Kwon et al. 2023, "Efficient Memory Management for LLM Serving", figure 11)."""
SHAREGPT_OUTPUT_TOKENS = 338
"""Mean length of ShareGPT's answers (as above)."""
_SIGMA = 1.0
"""Spread of the logarithm of both lengths: ours, so that one in ten is over twice the mean, and half under 0.6 of it."""
_SHORTEST, _LONGEST = 4, 1024
DEFAULT_MAX_TOKENS = 128
"""Asked of prompts that come without a bound of their own."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, and how long its answer may be."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    """None: whatever the load says."""

    @property
    def text(self) -> str:
        """All contents, for servers that are asked for plain completions."""
        return "\n\n".join(str(message["content"]) for message in self.messages)


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What all requests of a load share."""

    model: str
    api: Api = "chat"
    max_tokens: int | None = None
    """Asked of every request; None: what the prompt says, else `DEFAULT_MAX_TOKENS`."""
    temperature: float = 0.0
    ignore_eos: bool = False
    """Not one of OpenAI's fields: answers go on to max_tokens, where the server knows it."""

    def body(self, prompt: Prompt) -> bytes:
        """The JSON of a streamed request that asks for its usage."""
        fields: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": self.max_tokens or prompt.max_tokens or DEFAULT_MAX_TOKENS,
            "temperature": self.temperature,
        }
        if self.api == "chat":
            fields["messages"] = prompt.messages
        else:
            fields["prompt"] = prompt.text
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields)


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSONL file: each line has ``messages`` or ``prompt``, and may have ``max_tokens``.

    Raises:
        HelixError: the file cannot be read or a line is no prompt; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise HelixError(f"Cannot read prompts from {path}: {reason}.") from error
    prompts = [_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise HelixError(f"{path} holds no prompts.")
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    wanted = 'a JSON object like {"messages": [{"role": "user", "content": "…"}]} or {"prompt": "…"}'
    try:
        fields = json.loads(line)
        messages = fields.get("messages") or [{"role": "user", "content": fields["prompt"]}]
        valid = all(isinstance(message["role"], str) and message["content"] for message in messages)
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise HelixError(f"{where} is not {wanted}.")
    max_tokens = fields.get("max_tokens")
    if not (max_tokens is None or (type(max_tokens) is int and max_tokens > 0)):
        raise HelixError(f"{where}: max_tokens is {max_tokens!r}, not a whole number above zero.")
    return Prompt(messages, max_tokens)


def repeated(prompts: list[Prompt]) -> Iterator[Prompt]:
    """The prompts in order, for ever: from the second round on a server may find them in its cache."""
    return cycle(prompts)


def synthetic(
    seed: int,
    *,
    prompt_tokens: float = SHAREGPT_PROMPT_TOKENS,
    output_tokens: float = SHAREGPT_OUTPUT_TOKENS,
) -> Iterator[Prompt]:
    """Made-up prompts for ever, no two alike, of log-normal lengths with these means (cut to 4 … 1,024 tokens).

    Prompts are strings of common English words, about a token each for most tokenizers; what they really are the
    server's usage tells.  The same seed makes the same prompts.
    """
    dice = random.Random(seed)
    while True:
        words = [dice.choice(_WORDS) for _ in range(_length(dice, prompt_tokens))]
        content = f"Go on with this story: {' '.join(words)}"
        yield Prompt([{"role": "user", "content": content}], _length(dice, output_tokens))


def _length(dice: random.Random, mean: float) -> int:
    """From a log-normal distribution: its mean is exp(mu + sigma²/2)."""
    drawn = dice.lognormvariate(math.log(mean) - _SIGMA**2 / 2, _SIGMA)
    return round(min(max(drawn, _SHORTEST), _LONGEST))


_STORY = """
    the of and to in is that it was for on are as with his they at be this have from or had by word but what some we
    can out other were all there when up use your how said an each she which do their time if will way about many
    then them write would like so these her long make thing see him two has look more day could go come did number
    sound no most people my over know water than call first who may down side been now find any new work part take
    get place made live where after back little only round man year came show every good me give our under name very
    through just form sentence great think say help low line differ turn cause much mean before move right boy old
    too same tell does set three want air well also play small end put home read hand port large spell add even land
"""
_WORDS = tuple(_STORY.split())
