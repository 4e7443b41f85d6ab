"""The limits as middlewares, around every route that asks a model for something.

Refusals come before a body is read.  Knows nothing about what is asked.
"""

import asyncio

from aiohttp import web
from aiohttp.typedefs import Handler

from helix_gateway.gateway.errors import ApiError
from helix_gateway.gateway.limits.time import end
from helix_gateway.gateway.state import CALLERS, context_of, settings_of


def asks_a_model(request: web.Request) -> bool:
    """Whether a route that exists is asked to do work; the others only tell what there is."""
    return request.method == "POST" and request.match_info.http_exception is None


@web.middleware
async def limit_rate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse a caller that is over its limits, and tell each what is left."""
    if not asks_a_model(request):
        return await handler(request)
    context = context_of(request)
    caller = request.app[CALLERS].of(context.key_name)
    caller.enter()
    try:
        context.headers.update(caller.headers())
        return await handler(request)
    finally:
        caller.leave(context.tokens)


@web.middleware
async def limit_time(request: web.Request, handler: Handler) -> web.StreamResponse:
    """End what takes longer than the server allows.

    A stream that has begun looks at the clock itself, since what it has to say comes as an event.
    """
    limit_s = settings_of(request).request_timeout_s
    if limit_s is None or not asks_a_model(request):
        return await handler(request)
    limit = context_of(request).time_limit
    limit.limit_s = limit_s
    answering = asyncio.ensure_future(handler(request))
    try:
        await asyncio.wait({answering}, timeout=limit.left_s)
        if answering.done() or limit.told_by_stream:
            return await answering
        raise ApiError.timed_out(limit_s)
    finally:
        await end(answering)
