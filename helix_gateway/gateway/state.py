"""What the application and each request carry from middleware to handler, under typed keys.

Knows nothing about what is in them.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from helix_gateway.core.errors import HelixError
from helix_gateway.gateway.errors import ApiError
from helix_gateway.gateway.registry import ModelRegistry
from helix_gateway.gateway.settings import GatewaySettings

SETTINGS = web.AppKey("helix_settings", GatewaySettings)
MODELS = web.AppKey("helix_models", ModelRegistry)
WORKERS = web.AppKey("helix_workers", Executor)

_CONTEXT = "helix_request_context"

T = TypeVar("T")


@dataclass(slots=True)
class RequestContext:
    """One request's id, its clock, the headers its response will get, and the figures of its log line."""

    request_id: str
    started_s: float = field(default_factory=time.perf_counter)
    headers: dict[str, str] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)

    @property
    def elapsed_ms(self) -> float:
        """Since the request's head was read."""
        return (time.perf_counter() - self.started_s) * 1000.0

    def note_error(self, error: Exception, api_error: ApiError) -> None:
        """Put an error into the log line; one that nobody foresaw goes with its traceback."""
        self.log["error"] = api_error.message
        if api_error.status >= 500:
            self.log["exception_type"] = type(error).__name__
            self.log["exc_info"] = None if isinstance(error, HelixError) else error


def attach_context(request: web.Request, context: RequestContext) -> None:
    """Give a request its context; the outermost middleware does so."""
    request[_CONTEXT] = context


def context_of(request: web.BaseRequest) -> RequestContext:
    """The request's context."""
    context: RequestContext = request[_CONTEXT]
    return context


def settings_of(request: web.Request) -> GatewaySettings:
    """The gateway's settings."""
    return request.app[SETTINGS]


def models_of(request: web.Request) -> ModelRegistry:
    """The served models."""
    return request.app[MODELS]


INLINE_SIZE = 2000
"""Characters of text whose handling takes about a millisecond at most: shorter work stays on the event loop."""


async def sized(request: web.Request, size: int, work: Callable[..., T], *args: Any) -> T:
    """Run ``work`` at once where ``size``, in characters, is small; else in a worker thread."""
    if size <= INLINE_SIZE:
        return work(*args)
    return await in_worker(request, work, *args)


async def in_worker(request: web.Request, work: Callable[..., T], *args: Any) -> T:
    """Run ``work`` in a worker thread, so that the event loop goes on serving others."""
    return await asyncio.get_running_loop().run_in_executor(request.app[WORKERS], work, *args)
