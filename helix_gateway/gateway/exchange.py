"""What both generation routes do between a checked body and a written answer.

Opens the exchange (plan, headers, log fields), counts what passes, and writes a JSON body or a stream.  Knows
nothing about what chat and completions look like.
"""

import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from time import perf_counter
from typing import Any, TypeVar

from aiohttp import web

from helix_gateway.gateway.body import Body
from helix_gateway.gateway.chunks import in_pieces, to_json
from helix_gateway.gateway.errors import ApiError, to_api_error
from helix_gateway.gateway.generation import Deltas, closing, generate, without_output
from helix_gateway.gateway.params import Plan, Wanted, make_plan
from helix_gateway.gateway.prompts import Prompt
from helix_gateway.gateway.registry import ServedModel
from helix_gateway.gateway.reply import Reply, Tally
from helix_gateway.gateway.schemas.common import GenerationRequest
from helix_gateway.gateway.sse import EventStream
from helix_gateway.gateway.state import Generation, RequestContext, context_of, settings_of, sized

MAX_HEADER_CHARACTERS = 1000

T = TypeVar("T")

_unsafe_in_header = re.compile(r"[^A-Za-z0-9_.\[\]-]")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request on its way: what was planned for it and what has been counted."""

    request: web.Request
    context: RequestContext
    served: ServedModel
    reply: Reply
    prompts: Sequence[Prompt]
    plan: Plan
    tally: Tally

    async def deltas(self) -> Deltas:
        """The engine's deltas, counted as they pass."""
        try:
            async with closing(self._source()) as source:
                async for choice, delta in source:
                    self.tally.add(choice, delta)
                    self.context.tokens = self.tally.total_tokens  # a request that the engine refuses costs none
                    yield choice, delta
        finally:
            self.context.log.update(self.tally.for_log())

    async def written(self, size: int, write: Callable[..., T], *args: Any) -> T:
        """What ``write(*args)`` makes, in a worker thread where ``size`` (of `weight`) says that it takes long."""
        return await sized(self.request, size, write, *args)

    async def whole(self, size: int, write: Callable[..., Mapping[str, object]], *args: Any) -> web.Response:
        """The answer that is not a stream: the JSON of what ``write(*args)`` makes; ``size`` as for `written`."""
        payload = await self.written(size, lambda: in_pieces(write(*args)))
        return web.Response(body=payload, content_type="application/json")

    def _source(self) -> Deltas:
        deltas = generate(self.served.service, self.plan)
        return without_output(deltas) if self.plan.prompt_only else deltas


async def open_exchange(
    request: web.Request,
    served: ServedModel,
    body: Body[Any],
    reply: Reply,
    prompts: Sequence[Prompt],
    wanted: Wanted,
) -> Exchange:
    """Plan the calls and say in headers and log what the client should know.

    Raises:
        ApiError: 400.
    """
    fields: GenerationRequest = body.fields
    size = sum(map(len, fields.bad_words))
    plan = await sized(request, size, make_plan, reply.id, served, fields, prompts, wanted)
    context = context_of(request)
    _tell(context, body.ignored, plan)
    context.log.update(model=served.name, stream=fields.stream, choices=plan.num_choices * len(prompts))
    if settings_of(request).log_prompts:
        context.log["prompts"] = [prompt.token_ids if prompt.text is None else prompt.text for prompt in prompts]
    tally = Tally([len(prompt.token_ids) for prompt in prompts], plan.num_choices)
    context.generation = Generation(
        plan.calls, served.name, reply.id, fields.stream, tally.measured, tally.finish_reasons, perf_counter()
    )
    return Exchange(request, context, served, reply, prompts, plan, tally)


def _tell(context: RequestContext, ignored: list[str], plan: Plan) -> None:
    context.headers["x-helix-seed"] = str(plan.seed)
    if ignored:
        context.headers["x-helix-ignored-fields"] = context.log["ignored_fields"] = _header_list(ignored)
    if plan.clamped_to is not None:
        context.headers["x-helix-clamped"] = context.log["clamped"] = f"max_tokens={plan.clamped_to}"


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
