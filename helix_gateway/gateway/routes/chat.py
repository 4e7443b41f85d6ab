"""`/v1/chat/completions`, streaming and not.

Knows nothing about tokens beyond their ids, nor about how the engine makes them.
"""

from typing import Any

from aiohttp import web

from helix_gateway.gateway.body import read_body
from helix_gateway.gateway.chunks import NO_USAGE_YET, ChunkFrame, in_pieces, to_json
from helix_gateway.gateway.exchange import Exchange, answer_stream, plan_exchange
from helix_gateway.gateway.generation import Answer, best_answers, gather_answers, weight
from helix_gateway.gateway.logprobs import chat_logprobs, prompt_logprobs
from helix_gateway.gateway.params import Wanted
from helix_gateway.gateway.prompts import chat_prompt, predicted_tokens
from helix_gateway.gateway.registry import ServedModel
from helix_gateway.gateway.reply import new_reply
from helix_gateway.gateway.route import EVENTS, GENERATION_ERRORS, GENERATION_HEADERS, Example, Response, Route
from helix_gateway.gateway.schemas.answers import ChatCompletion, ChatCompletionChunk
from helix_gateway.gateway.schemas.chat import ChatRequest
from helix_gateway.gateway.state import models_of, settings_of
from helix_gateway.service.api import TextDelta


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """Answer one conversation."""
    body = await read_body(request, ChatRequest)
    served = models_of(request).resolve_ready(body.fields.model)
    prompt = await chat_prompt(request, served, body.prompt)
    predicted = await predicted_tokens(request, served, body.fields.prediction)
    wanted = _wanted(body.fields, settings_of(request).default_max_tokens, predicted)
    exchange = await plan_exchange(request, served, body, new_reply("chatcmpl", served), [prompt], wanted)
    async with exchange:
        if body.fields.stream:
            return await answer_stream(request, exchange.events(exchange.deltas(), _ChunkWriter(exchange, body.fields)))
        answers = await gather_answers(exchange.deltas(), exchange.plan.num_choices)
        return await exchange.whole(sum(map(weight, answers)), _body, exchange, body.fields, answers)


def _wanted(body: ChatRequest, default_max_tokens: int | None, predicted: list[int]) -> Wanted:
    return Wanted(
        token_limit=body.token_limit,
        default_limit=default_max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        prediction_token_ids=predicted,
    )


# ---- the whole answer ---------------------------------------------------------------------------------------


def _body(exchange: Exchange, body: ChatRequest, answers: list[Answer]) -> dict[str, Any]:
    chosen = best_answers(answers, exchange.plan.num_choices, body.n)
    return {
        **exchange.reply.fields("chat.completion"),
        "choices": [_choice(exchange.served, body, index, answer) for index, answer in enumerate(chosen)],
        "usage": exchange.tally.usage(),
        **_about_prompt(exchange, body, answers[0].prompt_logprobs),
    }


def _choice(served: ServedModel, body: ChatRequest, index: int, answer: Answer) -> dict[str, Any]:
    content = chat_logprobs(served.texts, answer.logprobs) if body.logprobs else None
    choice: dict[str, Any] = {
        "index": index,
        "message": {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []},
        "logprobs": None if content is None else {"content": content, "refusal": None},
        "finish_reason": answer.finish_reason,
    }
    if answer.stop_reason is not None:
        choice["stop_reason"] = answer.stop_reason
    if body.return_token_ids:
        choice["token_ids"] = answer.token_ids
    return choice


def _about_prompt(exchange: Exchange, body: ChatRequest, logprobs: Any) -> dict[str, Any]:
    """What was asked about the prompt, beside the choices."""
    about: dict[str, Any] = {}
    if body.return_token_ids:
        about["prompt_token_ids"] = exchange.prompts[0].token_ids
    if body.prompt_logprobs is not None and logprobs is not None:
        about["prompt_logprobs"] = prompt_logprobs(exchange.served.texts, logprobs, body.prompt_logprobs)
    return about


# ---- the stream ---------------------------------------------------------------------------------------------


class _ChunkWriter:
    """Writes a delta as chunks: the role once a choice, then text, and a chunk of its own for the finish."""

    def __init__(self, exchange: Exchange, body: ChatRequest) -> None:
        usage = NO_USAGE_YET if body.stream_options.include_usage else b""
        self._frame = ChunkFrame(exchange.reply, "chat.completion.chunk", usage=usage)
        self._exchange = exchange
        self._body = body
        self._opened: set[int] = set()

    def weight(self, _choice: int, delta: TextDelta) -> int:
        """See `EventWriter`."""
        return weight(delta)

    def chunks(self, choice: int, delta: TextDelta) -> bytes:
        """See `EventWriter`."""
        payload = b""
        if choice not in self._opened:
            self._opened.add(choice)
            payload = self._opening(choice, delta)
        if delta.text or (delta.token_ids and self._tells_tokens):
            payload += self._text(choice, delta)
        if delta.finish_reason is not None:
            payload += self._finish(choice, delta)
        return payload

    def closing_events(self) -> bytes:
        """The usage, where it was asked for."""
        return self._frame.usage_chunk(self._exchange.tally.usage()) if self._body.stream_options.include_usage else b""

    @property
    def _tells_tokens(self) -> bool:
        return self._body.logprobs or self._body.return_token_ids

    def _opening(self, choice: int, delta: TextDelta) -> bytes:
        about = _about_prompt(self._exchange, self._body, delta.prompt_logprobs) if choice == 0 else {}
        beside = b"," + in_pieces(about)[1:-1] if about else b""
        fields = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return self._frame.chunk(choice, fields, beside)

    def _text(self, choice: int, delta: TextDelta) -> bytes:
        fields = b'"delta":{"content":%b},"logprobs":%b,"finish_reason":null%b'
        return self._frame.chunk(choice, fields % (to_json(delta.text), self._logprobs(delta), self._ids(delta)))

    def _logprobs(self, delta: TextDelta) -> bytes:
        if not self._body.logprobs:
            return b"null"
        content = chat_logprobs(self._exchange.served.texts, delta.logprobs or ())
        return to_json({"content": content, "refusal": None})

    def _ids(self, delta: TextDelta) -> bytes:
        return b',"token_ids":' + to_json(delta.token_ids) if self._body.return_token_ids else b""

    def _finish(self, choice: int, delta: TextDelta) -> bytes:
        why = b"" if delta.stop_reason is None else b',"stop_reason":' + to_json(delta.stop_reason)
        return self._frame.chunk(
            choice,
            b'"delta":{},"logprobs":null,"finish_reason":"%b"%b' % ((delta.finish_reason or "stop").encode(), why),
        )


# ---- what clients are told of it ----------------------------------------------------------------------------

_QUESTION = {"role": "user", "content": "Name three colours."}

ROUTES = (
    Route(
        method="POST",
        path="/v1/chat/completions",
        handler=create_chat_completion,
        tag="OpenAI",
        summary="Answer a conversation",
        description="The messages go through the model's own chat template. With `stream`, the first chunk of each "
        "choice has the role, and exactly one chunk of each has its `finish_reason`.",
        request=ChatRequest,
        examples=(
            Example("A question", {"messages": [_QUESTION], "max_tokens": 40, "temperature": 0}),
            Example("As a stream", {"messages": [_QUESTION], "max_tokens": 40, "temperature": 0, "stream": True}),
            Example(
                "With log-probabilities",
                {"messages": [_QUESTION], "max_tokens": 5, "seed": 1, "logprobs": True, "top_logprobs": 2},
            ),
        ),
        responses=(
            Response(description="The answer: whole, or as events with `stream`.", schema=ChatCompletion),
            Response(description="The answer as events.", schema=ChatCompletionChunk, media_type=EVENTS),
        ),
        headers=GENERATION_HEADERS,
        errors=GENERATION_ERRORS,
    ),
)
