"""Work that may take only so long, and work that is ended: both leave nothing running behind them.

Knows nothing about what the work is.
"""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from helix_gateway.gateway.errors import ApiError

T = TypeVar("T")


@dataclass(slots=True)
class TimeLimit:
    """How long one request may take, from its head on."""

    limit_s: float | None = None
    """None: as long as it likes."""
    told_by_stream: bool = False
    """Whether the head of a stream has been sent: from then on its end is an event, which the stream writes."""
    _started_s: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float | None:
        """Until it has taken as long as it may; None: no such limit."""
        return None if self.limit_s is None else max(0.0, self._started_s + self.limit_s - time.perf_counter())


async def in_time(limit: TimeLimit, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work``, or end it once the request has taken as long as it may.

    Raises:
        ApiError: 504.
    """
    if limit.limit_s is None:
        return await work
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({working}, timeout=limit.left_s)
        if working.done():
            return working.result()
        raise ApiError.timed_out(limit.limit_s)
    finally:
        await end(working)


async def end(*tasks: "asyncio.Future[Any] | None") -> None:
    """Cancel tasks and wait until they have come to their end, whatever that is."""
    for task in tasks:
        if task is not None:
            task.cancel()
            if not task.done():
                await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # looked at, so that asyncio does not report it as lost
