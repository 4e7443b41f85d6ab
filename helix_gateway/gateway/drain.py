"""How a server stops: what is in flight goes on for a while, what comes new is sent elsewhere.

Knows nothing about signals (`server.py`) nor about what is answered.
"""

import asyncio

from aiohttp import web
from aiohttp.typedefs import Handler

from helix_gateway.gateway.errors import ApiError
from helix_gateway.gateway.state import API, DRAIN, settings_of


@web.middleware
async def count_and_drain(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count what is in flight; once the server drains, refuse what comes.  Probes and scrapers go on."""
    if request.match_info.handler in request.app[API].open_handlers:
        return await handler(request)
    drain = request.app[DRAIN]
    if drain.draining:
        raise ApiError.stopping(settings_of(request).retry_after_s)
    drain.enter()
    try:
        return await handler(request)
    finally:
        drain.leave()


async def drain(app: web.Application, timeout_s: float) -> int:
    """Take nothing new and wait for what is in flight; answers with how much was left at the end of ``timeout_s``."""
    state = app[DRAIN]
    state.draining = True
    try:
        await asyncio.wait_for(state.idle.wait(), timeout_s)
    except asyncio.TimeoutError:
        return state.in_flight
    return 0
