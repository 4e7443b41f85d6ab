"""How late the event loop comes to what is due: what every client feels when something holds the loop up.

Knows nothing about what runs on it.
"""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from helix_gateway.gateway.state import METRICS
from helix_gateway.telemetry.catalogue import LOOP_LAG

_INTERVAL_S = 0.25


async def watch_lag(app: web.Application) -> AsyncIterator[None]:
    """Sample the lag for as long as the application lives (a ``cleanup_ctx``)."""
    task = asyncio.create_task(_watch(app))
    yield
    task.cancel()
    await asyncio.wait({task})


async def _watch(app: web.Application) -> None:
    clock, histogram = asyncio.get_running_loop().time, app[METRICS].histogram(LOOP_LAG)
    while True:
        due = clock() + _INTERVAL_S
        await asyncio.sleep(_INTERVAL_S)
        histogram.observe_one((), max(0.0, clock() - due))
