"""What both generation routes do between a checked body and a written answer.

Plans the exchange, asks the engine, tells headers and log of it, counts what passes, and writes a JSON body or a stream.  Knows
nothing about what chat and completions look like.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter
from typing import Any, Protocol, TypeVar

from aiohttp import web

from helix_gateway.gateway.body import Body
from helix_gateway.gateway.chunks import in_pieces, to_json
from helix_gateway.gateway.errors import ApiError, to_api_error
from helix_gateway.gateway.generation import Deltas, Merged, close, closing, without_output
from helix_gateway.gateway.params import Plan, Wanted, make_plan
from helix_gateway.gateway.prompts import Prompt
from helix_gateway.gateway.registry import ServedModel
from helix_gateway.gateway.reply import Reply, Tally
from helix_gateway.gateway.schemas.common import GenerationRequest
from helix_gateway.gateway.sse import DONE, EventStream
from helix_gateway.gateway.state import (
    INLINE_SIZE,
    Generation,
    RequestContext,
    context_of,
    in_worker,
    settings_of,
    sized,
)
from helix_gateway.service.api import TextDelta

MAX_HEADER_CHARACTERS = 1000

T = TypeVar("T")

_unsafe_in_header = re.compile(r"[^A-Za-z0-9_.\[\]-]")


class EventWriter(Protocol):
    """How a route writes its stream."""

    def weight(self, choice: int, delta: TextDelta, /) -> int:
        """How much `chunks` would write (see `generation.weight`)."""

    def chunks(self, choice: int, delta: TextDelta, /) -> bytes:
        """One delta's events, joined; empty where there is nothing to tell yet."""

    def closing_events(self) -> bytes:
        """What comes after all choices have ended, joined."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request on its way: what was planned for it and what has been counted.

    As a context it asks the engine, and ends what has not ended on the way out, which frees the engine's blocks.
    """

    request: web.Request
    context: RequestContext
    served: ServedModel
    body: Body[Any]
    reply: Reply
    prompts: Sequence[Prompt]
    plan: Plan
    tally: Tally
    _streams: list[AsyncIterator[TextDelta]] = field(default_factory=list)
    """Of each prompt."""

    async def __aenter__(self) -> None:
        """Ask first: the engine is at work while the rest is made."""
        try:
            try:
                for call in self.plan.calls:
                    self._streams.append(self.served.service.generate(call))
            finally:
                self._tell()
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        async with AsyncExitStack() as streams:  # each is closed, whatever comes of the others
            for stream in self._streams:
                streams.push_async_callback(close, stream)
            self.context.log.update(self.tally.for_log())

    def deltas(self) -> Deltas:
        """The engine's deltas, counted as they pass."""
        deltas = Merged(self._streams, self.plan.num_choices)
        return _Counted(without_output(deltas) if self.plan.prompt_only else deltas, self.tally, self.context)

    async def events(self, deltas: Deltas, writer: EventWriter) -> AsyncGenerator[bytes, None]:
        """The stream of these `deltas`; what is told once every choice has ended goes with `DONE`, in one payload."""
        last = b""
        async with closing(deltas) as source:
            async for choice, delta in source:
                payload = await self.written(writer.weight(choice, delta), writer.chunks, choice, delta)
                if self.tally.complete:
                    last += payload  # of several deltas, where one waited for its prompt's logprobs
                elif payload:
                    yield payload
        yield last + writer.closing_events() + DONE

    async def written(self, size: int, write: Callable[..., T], *args: Any) -> T:
        """What ``write(*args)`` makes, in a worker thread where ``size`` (of `weight`) says that it takes long."""
        return write(*args) if size <= INLINE_SIZE else await in_worker(self.request, write, *args)

    async def whole(self, size: int, write: Callable[..., Mapping[str, object]], *args: Any) -> web.Response:
        """The answer that is not a stream: the JSON of what ``write(*args)`` makes; ``size`` as for `written`."""
        payload = await self.written(size, lambda: in_pieces(write(*args)))
        return web.Response(body=payload, content_type="application/json")

    def _tell(self) -> None:
        """Say in headers and log what the client and the operator should know."""
        context, plan, stream = self.context, self.plan, self.body.fields.stream
        context.headers["x-helix-seed"] = str(plan.seed)
        if ignored := self.body.ignored:
            context.headers["x-helix-ignored-fields"] = context.log["ignored_fields"] = _header_list(ignored)
        if plan.clamped_to is not None:
            context.headers["x-helix-clamped"] = context.log["clamped"] = f"max_tokens={plan.clamped_to}"
        context.log.update(model=self.served.name, stream=stream, choices=plan.num_choices * len(self.prompts))
        if settings_of(self.request).log_prompts:
            context.log["prompts"] = [one.token_ids if one.text is None else one.text for one in self.prompts]
        tally = self.tally
        context.generation = Generation(
            plan.calls, self.served.name, self.reply.id, stream, tally.measured, tally.finish_reasons, perf_counter()
        )


class _Counted(AsyncIterator[tuple[int, TextDelta]]):
    """Deltas, counted as they pass."""

    def __init__(self, deltas: Deltas, tally: Tally, context: RequestContext) -> None:
        self._deltas = deltas
        self._tally = tally
        self._context = context

    async def __anext__(self) -> tuple[int, TextDelta]:
        choice, delta = await self._deltas.__anext__()
        self._tally.add(choice, delta)
        self._context.tokens = self._tally.total_tokens  # a request that the engine refuses costs none
        return choice, delta

    async def aclose(self) -> None:
        """End what is counted."""
        await close(self._deltas)


async def plan_exchange(
    request: web.Request,
    served: ServedModel,
    body: Body[Any],
    reply: Reply,
    prompts: Sequence[Prompt],
    wanted: Wanted,
) -> Exchange:
    """Plan the calls.

    Raises:
        ApiError: 400.
    """
    fields: GenerationRequest = body.fields
    size = sum(map(len, fields.bad_words))
    plan = await sized(request, size, make_plan, reply.id, served, fields, prompts, wanted)
    tally = Tally([len(prompt.token_ids) for prompt in prompts], plan.num_choices)
    return Exchange(request, context_of(request), served, body, reply, prompts, plan, tally)


def _header_list(names: list[str]) -> str:
    """Names as a header may hold them; a list too long ends with how many more there are."""
    text = ""
    for told, name in enumerate(names):
        safe = _unsafe_in_header.sub("_", name)[:80]
        if len(text) + len(safe) > MAX_HEADER_CHARACTERS:
            return f"{text}, +{len(names) - told} more"
        text = f"{text}, {safe}" if text else safe
    return text


def answer_json(body: Mapping[str, object]) -> web.Response:
    """A short answer."""
    return web.Response(body=to_json(body), content_type="application/json")


async def answer_stream(request: web.Request, events: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    """The answer as server-sent events."""
    settings, context = settings_of(request), context_of(request)

    def explain(error: Exception) -> ApiError:
        api_error = to_api_error(error, request_id=context.request_id, retry_after_s=settings.retry_after_s)
        context.note_error(error, api_error)
        return api_error

    stream = EventStream(request, context.time_limit, settings.ping_interval_s)
    try:
        response = await stream.run(events, explain)
    finally:
        if stream.answered:
            context.answered_status = HTTPStatus.OK
    if stream.client_left:
        context.log["client_left"] = True
    return response
