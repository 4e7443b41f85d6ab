"""`/v1/completions`, streaming and not.

Knows nothing about how the engine makes tokens.
"""

from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from aiohttp import web

from helix_gateway.core.event import TokenLogprobs
from helix_gateway.gateway.body import read_body
from helix_gateway.gateway.chunks import NO_USAGE_YET, ChunkFrame, in_pieces, to_json
from helix_gateway.gateway.exchange import Exchange, answer_stream, plan_exchange
from helix_gateway.gateway.generation import (
    Answer,
    best_answers,
    gather_answers,
    logprobs_weight,
    prompt_logprobs_first,
    weight,
)
from helix_gateway.gateway.logprobs import LegacyLogprobs, joined, prompt_logprobs
from helix_gateway.gateway.params import Wanted
from helix_gateway.gateway.prompts import Prompt, completion_prompts, predicted_tokens
from helix_gateway.gateway.reply import new_reply
from helix_gateway.gateway.route import EVENTS, GENERATION_ERRORS, GENERATION_HEADERS, Example, Response, Route
from helix_gateway.gateway.schemas.answers import Completion, CompletionChunk
from helix_gateway.gateway.schemas.completions import CompletionRequest
from helix_gateway.gateway.state import models_of
from helix_gateway.service.api import TextDelta

PromptLogprobs = list[TokenLogprobs | None] | None


async def create_completion(request: web.Request) -> web.StreamResponse:
    """Go on from one prompt or from several."""
    body = await read_body(request, CompletionRequest)
    served = models_of(request).resolve_ready(body.fields.model)
    prompts = await completion_prompts(request, served, body.prompt, add_special_tokens=body.fields.add_special_tokens)
    reply = new_reply("cmpl", served)
    predicted = await predicted_tokens(request, served, body.fields.prediction)
    exchange = await plan_exchange(request, served, body, reply, prompts, _wanted(body.fields, predicted))
    async with exchange:
        if body.fields.stream:
            return await answer_stream(request, _events(exchange, body.fields))
        answers = await gather_answers(exchange.deltas(), exchange.plan.num_choices * len(prompts))
        return await exchange.whole(sum(map(weight, answers)), _body, exchange, body.fields, answers)


def _wanted(body: CompletionRequest, predicted: list[int]) -> Wanted:
    asked = (body.prompt_logprobs, body.logprobs if body.echo else None)
    return Wanted(
        token_limit=body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=max((top for top in asked if top is not None), default=None),
        prediction_token_ids=predicted,
    )


class _Choices:
    """What the choices say, as dicts: an opening where the prompt is asked back, then what was generated."""

    def __init__(self, exchange: Exchange, body: CompletionRequest) -> None:
        self._exchange = exchange
        self._body = body
        self._texts = exchange.served.texts
        self._legacy: defaultdict[int, LegacyLogprobs] = defaultdict(
            lambda: LegacyLogprobs(self._texts, body.logprobs or 0)
        )
        self._echoes: dict[int, str] = {}

    def opening(self, choice: int, prompt_index: int, logprobs: PromptLogprobs) -> dict[str, Any]:
        """Text and logprobs of the echoed prompt, and what else was asked about it."""
        prompt = self._exchange.prompts[prompt_index]
        opening: dict[str, Any] = {"text": self._echo(prompt_index, prompt), "logprobs": None}
        if self._body.echo and self._body.logprobs is not None and logprobs is not None:
            opening["logprobs"] = self._legacy[choice].of_prompt(prompt.token_ids, logprobs, text=opening["text"])
        if self._body.return_token_ids:
            opening["prompt_token_ids"] = prompt.token_ids
        if self._body.prompt_logprobs is not None and logprobs is not None:
            opening["prompt_logprobs"] = prompt_logprobs(self._texts, logprobs, self._body.prompt_logprobs)
        return opening

    def _echo(self, prompt_index: int, prompt: Prompt) -> str:
        if not self._body.echo:
            return ""
        if prompt.text is not None:
            return prompt.text
        if prompt_index not in self._echoes:
            self._echoes[prompt_index] = self._exchange.served.service.tokenizer.decode(
                prompt.token_ids, skip_special_tokens=self._body.skip_special_tokens
            )
        return self._echoes[prompt_index]

    def output(self, choice: int, text: str, logprobs: Sequence[TokenLogprobs], ids: list[int]) -> dict[str, Any]:
        """The next stretch of what was generated."""
        output: dict[str, Any] = {"text": text, "logprobs": None}
        if self._body.logprobs is not None:
            output["logprobs"] = self._legacy[choice].of_output(logprobs)
        if self._body.return_token_ids:
            output["token_ids"] = ids
        return output


# ---- the whole answer ---------------------------------------------------------------------------------------


def _body(exchange: Exchange, body: CompletionRequest, answers: list[Answer]) -> dict[str, Any]:
    candidates = exchange.plan.num_choices
    asked_back = [answer.prompt_logprobs for answer in answers[::candidates]]
    writer = _Choices(exchange, body)
    chosen = enumerate(best_answers(answers, candidates, body.n))
    return {
        **exchange.reply.fields("text_completion"),
        "choices": [_choice(writer, index, answer, index // body.n, asked_back) for index, answer in chosen],
        "usage": exchange.tally.usage(),
    }


def _choice(
    writer: _Choices, index: int, answer: Answer, prompt_index: int, asked_back: Sequence[PromptLogprobs]
) -> dict[str, Any]:
    opening = writer.opening(index, prompt_index, asked_back[prompt_index])
    output = writer.output(index, answer.text, answer.logprobs, answer.token_ids)
    choice = {
        **opening,
        **output,
        "index": index,
        "text": opening["text"] + output["text"],
        "logprobs": joined(opening["logprobs"], output["logprobs"]),
        "finish_reason": answer.finish_reason,
    }
    return choice if answer.stop_reason is None else {**choice, "stop_reason": answer.stop_reason}


# ---- the stream ---------------------------------------------------------------------------------------------


def _events(exchange: Exchange, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    deltas = exchange.deltas()
    if exchange.plan.asks_prompt_logprobs:
        deltas = prompt_logprobs_first(deltas, exchange.plan.num_choices)
    return exchange.events(deltas, _ChunkWriter(exchange, body))


class _ChunkWriter:
    """Writes a delta as chunks: what is told of the prompt once a choice, then text, then the finish alone."""

    def __init__(self, exchange: Exchange, body: CompletionRequest) -> None:
        usage = NO_USAGE_YET if body.stream_options.include_usage else b""
        self._frame = ChunkFrame(exchange.reply, "text_completion", usage=usage)
        self._exchange = exchange
        self._tells_usage = body.stream_options.include_usage
        self._choices = _Choices(exchange, body)
        self._num_choices = exchange.plan.num_choices
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}
        self._opened: set[int] = set()
        self._plain = body.logprobs is None and not body.return_token_ids
        self._opens = body.echo or body.return_token_ids or body.prompt_logprobs is not None

    def weight(self, choice: int, delta: TextDelta) -> int:
        """See `EventWriter`."""
        echoed = None if choice in self._opened else self._prompt_logprobs.get(choice // self._num_choices)
        return weight(delta) + logprobs_weight(echoed)

    def chunks(self, choice: int, delta: TextDelta) -> bytes:
        """See `EventWriter`."""
        payload = b""
        if self._opens and choice not in self._opened:
            payload = self._opening(choice, delta)
        if delta.text or (delta.token_ids and not self._plain):
            payload += self._text(choice, delta)
        if delta.finish_reason is not None:
            payload += self._finish(choice, delta)
        return payload

    def closing_events(self) -> bytes:
        """The usage, where it was asked for."""
        return self._frame.usage_chunk(self._exchange.tally.usage()) if self._tells_usage else b""

    def _opening(self, choice: int, delta: TextDelta) -> bytes:
        self._opened.add(choice)
        prompt_index = choice // self._num_choices
        logprobs = self._prompt_logprobs.setdefault(prompt_index, delta.prompt_logprobs)
        opening = self._choices.opening(choice, prompt_index, logprobs)
        return self._frame.chunk(choice, in_pieces({**opening, "finish_reason": None})[1:-1])

    def _text(self, choice: int, delta: TextDelta) -> bytes:
        if self._plain:
            return self._frame.chunk(choice, b'"text":%b,"logprobs":null,"finish_reason":null' % to_json(delta.text))
        output = self._choices.output(choice, delta.text, delta.logprobs or (), delta.token_ids)
        return self._frame.chunk(choice, to_json({**output, "finish_reason": None})[1:-1])

    def _finish(self, choice: int, delta: TextDelta) -> bytes:
        finish = {"text": "", "logprobs": None, "finish_reason": delta.finish_reason}
        why = {} if delta.stop_reason is None else {"stop_reason": delta.stop_reason}
        return self._frame.chunk(choice, to_json({**finish, **why})[1:-1])


# ---- what clients are told of it ----------------------------------------------------------------------------

ROUTES = (
    Route(
        method="POST",
        path="/v1/completions",
        handler=create_completion,
        tag="OpenAI",
        summary="Go on from a text",
        description="From one prompt or from several, given as text or as token ids. Exactly one chunk of each choice "
        "in a stream has its `finish_reason`.",
        request=CompletionRequest,
        examples=(
            Example("A sentence", {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}),
            Example("As a stream", {"prompt": "Once upon a time", "max_tokens": 40, "stream": True}),
            Example("Two prompts, two texts each", {"prompt": ["One, two,", "Red, green,"], "n": 2, "seed": 1}),
        ),
        responses=(
            Response(description="The texts: whole, or as events with `stream`.", schema=Completion),
            Response(description="The texts as events.", schema=CompletionChunk, media_type=EVENTS),
        ),
        headers=GENERATION_HEADERS,
        errors=GENERATION_ERRORS,
    ),
)
