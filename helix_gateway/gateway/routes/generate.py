"""`/generate` and `/generate/stream`: one prompt, one text, and the figures of how it was made.

For programs that want tokens and timings without OpenAI's envelope.  Knows nothing about how the engine makes
tokens.
"""

from collections.abc import Sequence
from typing import Literal

from aiohttp import web

from helix_gateway.core.event import SequenceMetrics, TokenLogprobs
from helix_gateway.gateway.body import read_body
from helix_gateway.gateway.chunks import in_pieces
from helix_gateway.gateway.exchange import Exchange, answer_stream, plan_exchange
from helix_gateway.gateway.generation import Answer, gather_answers, weight
from helix_gateway.gateway.logprobs import chat_logprobs, prompt_logprobs
from helix_gateway.gateway.params import Wanted
from helix_gateway.gateway.prompts import predicted_tokens, single_prompt
from helix_gateway.gateway.reply import new_reply, tokens_per_second
from helix_gateway.gateway.route import EVENTS, GENERATION_ERRORS, GENERATION_HEADERS, Example, Response, Route
from helix_gateway.gateway.schemas.answers import (
    AboutPrompt,
    GenerateAnswer,
    GenerateEvent,
    GenerateMetrics,
    OutputLogprobs,
)
from helix_gateway.gateway.schemas.generate import GenerateRequest, GenerateStreamRequest
from helix_gateway.gateway.sse import event
from helix_gateway.gateway.state import models_of, settings_of
from helix_gateway.service.api import TextDelta


async def generate(request: web.Request) -> web.StreamResponse:
    """Go on from one prompt; a stream where the body asks for one."""
    return await _answer(request, GenerateRequest)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """The same, always as a stream."""
    return await _answer(request, GenerateStreamRequest)


async def _answer(request: web.Request, schema: type[GenerateRequest]) -> web.StreamResponse:
    body = await read_body(request, schema)
    fields = body.fields
    served = models_of(request).resolve_ready(fields.model)
    prompt = await single_prompt(request, served, body.prompt, add_special_tokens=fields.add_special_tokens)
    wanted = Wanted(
        token_limit=fields.max_tokens,
        default_limit=settings_of(request).default_max_tokens,
        logprobs=fields.logprobs,
        prompt_logprobs=fields.prompt_logprobs,
        prediction_token_ids=await predicted_tokens(request, served, fields.prediction),
    )
    exchange = await plan_exchange(request, served, body, new_reply("gen", served), [prompt], wanted)
    async with exchange:
        if fields.stream:
            return await answer_stream(request, exchange.events(exchange.deltas(), _EventWriter(exchange, fields)))
        (answer,) = await gather_answers(exchange.deltas(), 1)
        return await exchange.whole(weight(answer), _body, exchange, fields, answer)


def _body(exchange: Exchange, body: GenerateRequest, answer: Answer) -> GenerateAnswer:
    return {
        "id": exchange.reply.id,
        "model": exchange.reply.model,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": _reason(answer.finish_reason),
        "stop_reason": answer.stop_reason,
        "metrics": _metrics(answer.metrics),
        **_of_output(exchange, body, answer.logprobs),
        **_of_prompt(exchange, body, answer.prompt_logprobs),
    }


class _EventWriter:
    """Writes a delta as one event; the first also tells of the prompt."""

    def __init__(self, exchange: Exchange, body: GenerateRequest) -> None:
        self._exchange = exchange
        self._body = body
        self._opened = False

    def weight(self, _choice: int, delta: TextDelta) -> int:
        """See `EventWriter`."""
        return weight(delta)

    def chunks(self, _choice: int, delta: TextDelta) -> bytes:
        """See `EventWriter`."""
        exchange, body = self._exchange, self._body
        about_prompt: AboutPrompt = {} if self._opened else _of_prompt(exchange, body, delta.prompt_logprobs)
        self._opened = True
        output = _of_output(exchange, body, delta.logprobs or ())
        return event(in_pieces({**_event(exchange, delta), **output, **about_prompt}))

    def closing_events(self) -> bytes:
        """The last delta's event has told all."""
        return b""


def _event(exchange: Exchange, delta: TextDelta) -> GenerateEvent:
    told: GenerateEvent = {
        "id": exchange.reply.id,
        "model": exchange.reply.model,
        "text": delta.text,
        "token_ids": delta.token_ids,
        "finish_reason": None if delta.finish_reason is None else _reason(delta.finish_reason),
    }
    if delta.finish_reason is not None:
        told["stop_reason"] = delta.stop_reason
        told["metrics"] = _metrics(delta.metrics)
    return told


def _reason(reason: str | None) -> Literal["stop", "length"]:
    """Nothing else comes through: an answer that was aborted or failed has raised."""
    return "length" if reason == "length" else "stop"


def _of_output(exchange: Exchange, body: GenerateRequest, logprobs: Sequence[TokenLogprobs]) -> OutputLogprobs:
    return {} if body.logprobs is None else {"logprobs": chat_logprobs(exchange.served.texts, logprobs)}


def _of_prompt(exchange: Exchange, body: GenerateRequest, logprobs: list[TokenLogprobs | None] | None) -> AboutPrompt:
    about: AboutPrompt = {}
    if body.return_token_ids:
        about["prompt_token_ids"] = exchange.prompts[0].token_ids
    if body.prompt_logprobs is not None and logprobs is not None:
        about["prompt_logprobs"] = prompt_logprobs(exchange.served.texts, logprobs, body.prompt_logprobs)
    return about


def _metrics(measured: SequenceMetrics | None) -> GenerateMetrics:
    assert measured is not None, "the last delta of a choice carries its figures"
    times_s = measured.token_times_s
    return {
        "prompt_tokens": measured.prompt_tokens,
        "completion_tokens": measured.output_tokens,
        "cached_tokens": measured.cached_tokens,
        "draft_tokens": measured.draft_tokens,
        "accepted_tokens": measured.accepted_tokens,
        "preemptions": measured.num_preemptions,
        "queue_time_s": measured.queue_time_s,
        "time_to_first_token_s": measured.time_to_first_token_s,
        "generation_time_s": times_s[-1] if times_s else None,
        "tokens_per_second": tokens_per_second(times_s),
    }


# ---- what clients are told of them --------------------------------------------------------------------------

_ONE_EVENT_A_STEP = Response(
    description="The text as events, one for each step that added tokens.", schema=GenerateEvent, media_type=EVENTS
)

ROUTES = (
    Route(
        method="POST",
        path="/generate",
        handler=generate,
        tag="Helix",
        summary="Go on from a text, and tell how",
        description="One prompt, one text, its tokens and figures: time to first token, queue time, tokens a second, "
        "cached, drafted and accepted tokens.",
        request=GenerateRequest,
        examples=(
            Example("A sentence", {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}),
            Example("With a stop", {"prompt": "1, 2, 3,", "max_tokens": 40, "stop": [" 10"], "seed": 7, "top_k": 20}),
        ),
        responses=(
            Response(description="The text: whole, or as events with `stream`.", schema=GenerateAnswer),
            _ONE_EVENT_A_STEP,
        ),
        headers=GENERATION_HEADERS,
        errors=GENERATION_ERRORS,
    ),
    Route(
        method="POST",
        path="/generate/stream",
        handler=generate_stream,
        tag="Helix",
        summary="The same as a stream",
        description="An event for each step that added tokens; the last one has `finish_reason` and `metrics`.",
        request=GenerateStreamRequest,
        examples=(Example("A story", {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0.7}),),
        responses=(_ONE_EVENT_A_STEP,),
        headers=GENERATION_HEADERS,
        errors=GENERATION_ERRORS,
    ),
)
