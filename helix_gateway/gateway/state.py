"""What the application and each request carry from middleware to handler, under typed keys.

Knows nothing about what is in them.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from helix_gateway.core.errors import HelixError, InvalidRequestError
from helix_gateway.core.event import SequenceMetrics
from helix_gateway.gateway.errors import ApiError
from helix_gateway.gateway.keys import KeyRing
from helix_gateway.gateway.known_options import KnownOptions
from helix_gateway.gateway.limits.callers import Callers
from helix_gateway.gateway.limits.time import TimeLimit
from helix_gateway.gateway.long_bodies import LongBodies
from helix_gateway.gateway.openapi import OpenApi
from helix_gateway.gateway.registry import ModelRegistry
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.service.api import GenerationCall
from helix_gateway.telemetry.metrics import Metrics
from helix_gateway.telemetry.tracing import Tracer

SETTINGS = web.AppKey("helix_settings", GatewaySettings)
MODELS = web.AppKey("helix_models", ModelRegistry)
API = web.AppKey("helix_openapi", OpenApi)
KEYS = web.AppKey("helix_keys", KeyRing)
CALLERS = web.AppKey("helix_callers", Callers)
LONG_BODIES = web.AppKey("helix_long_bodies", LongBodies)
KNOWN_OPTIONS = web.AppKey("helix_known_options", KnownOptions)
WORKERS = web.AppKey("helix_workers", Executor)
METRICS = web.AppKey("helix_metrics", Metrics)
TRACER = web.AppKey("helix_tracer", Tracer)
"""Only where spans are wanted."""

T = TypeVar("T")


@dataclass(slots=True)
class Generation:
    """What a request asked of the engine and what came of it."""

    calls: Sequence[GenerationCall]
    """One a prompt."""
    model: str
    response_id: str
    stream: bool
    measured: Mapping[int, SequenceMetrics]
    """Of each choice that has come to its end."""
    finish_reasons: Sequence[str]
    submitted_s: float
    """When the engine was asked, on the clock of `RequestContext.started_s`."""


@dataclass(slots=True)
class RequestContext:
    """One request's id, its clock, the headers its response will get, and the figures of its log line."""

    request_id: str
    started_s: float = field(default_factory=time.perf_counter)
    headers: dict[str, str] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)
    key_name: str | None = None
    """Of the key that the client sent; None where no keys are set."""
    tokens: int = 0
    """Of prompt and answer, known at the end."""
    time_limit: TimeLimit = field(default_factory=TimeLimit)
    generation: Generation | None = None
    answered_status: int | None = None
    """Of a stream whose last event is written, whatever its client does from then on."""

    @property
    def elapsed_ms(self) -> float:
        """Since the request's head was read."""
        return (time.perf_counter() - self.started_s) * 1000.0

    def note_error(self, error: Exception, api_error: ApiError) -> None:
        """Put an error into the log line; one that nobody foresaw goes with its traceback.

        A message from `text/` may quote the prompt (a chat template writes what it likes), so it is left out.
        """
        quotes = isinstance(error, InvalidRequestError)
        self.log.update(error=None if quotes else api_error.message, param=api_error.param, code=api_error.code)
        if api_error.status >= 500:
            self.log["exception_type"] = type(error).__name__
            self.log["exc_info"] = None if isinstance(error, HelixError | ApiError) else error


class Drain:
    """What is in flight, and whether more may come."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self.idle = asyncio.Event()
        """Set while nothing is in flight."""
        self.idle.set()

    def enter(self) -> None:
        """Count one request, until it is told that it `leave`s."""
        self.in_flight += 1
        self.idle.clear()

    def leave(self) -> None:
        """See `enter`."""
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()


DRAIN = web.AppKey("helix_drain", Drain)

# Typed keys for requests came to aiohttp later than those for applications, and it warns of plain ones since.
_CONTEXT: Any = web.RequestKey("helix_context", RequestContext) if hasattr(web, "RequestKey") else "helix_context"


def attach_context(request: web.Request, context: RequestContext) -> None:
    """Give a request its context; the outermost middleware does so."""
    request[_CONTEXT] = context


def context_of(request: web.BaseRequest) -> RequestContext:
    """The request's context; a fresh one where aiohttp answers by itself before any middleware runs."""
    try:
        context: RequestContext = request[_CONTEXT]
    except KeyError:
        return RequestContext(new_request_id())
    return context


def new_request_id() -> str:
    """An id for a request that brought none."""
    return f"req_{os.urandom(16).hex()}"


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
