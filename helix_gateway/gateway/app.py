"""The aiohttp application: routes, middlewares, and what must be closed at the end.

Knows nothing about sockets (`server.py`) nor about where engines run: it is given services.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from helix_gateway.gateway.keys import KeyRing
from helix_gateway.gateway.known_options import KnownOptions
from helix_gateway.gateway.limits.callers import Callers
from helix_gateway.gateway.long_bodies import LongBodies
from helix_gateway.gateway.loop_lag import watch_lag
from helix_gateway.gateway.middlewares import add_headers, middlewares
from helix_gateway.gateway.openapi import OpenApi
from helix_gateway.gateway.registry import ModelRegistry
from helix_gateway.gateway.route import Route
from helix_gateway.gateway.routes import chat, completions, docs, generate, health, models, root
from helix_gateway.gateway.routes import metrics as metrics_route
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.gateway.state import (
    API,
    CALLERS,
    DRAIN,
    KEYS,
    KNOWN_OPTIONS,
    LONG_BODIES,
    METRICS,
    MODELS,
    SETTINGS,
    TRACER,
    WORKERS,
    Drain,
)
from helix_gateway.service.api import ModelService
from helix_gateway.telemetry.metrics import Metrics
from helix_gateway.telemetry.tracing import Tracer

ROUTES: tuple[Route, ...] = (
    *chat.ROUTES,
    *completions.ROUTES,
    *models.ROUTES,
    *generate.ROUTES,
    *health.ROUTES,
    *metrics_route.ROUTES,
    *docs.ROUTES,
    *root.ROUTES,
)
"""In the order in which people are told of them."""


def create_app(
    settings: GatewaySettings,
    models: Mapping[str, ModelService],
    metrics: Metrics | None = None,
    tracer: Tracer | None = None,
) -> web.Application:
    """The gateway over ``models``: names that clients may ask for, several of one service being aliases.

    Services are used as they are: whoever made them starts and stops them (``app.cleanup_ctx`` is a good place).
    ``metrics`` are those that their observers keep; ``tracer``, where there is one, is told of every request and
    closed at the end.

    Raises:
        KeyFileError: the file of keys cannot be used.
    """
    app = web.Application(middlewares=middlewares(settings), client_max_size=settings.max_body_bytes)
    app[SETTINGS] = settings
    app[MODELS] = ModelRegistry(models, settings.served_model_names)
    app[API] = OpenApi(ROUTES, model=next(iter(app[MODELS].names), ""))
    app[KEYS] = KeyRing(settings.api_keys, settings.api_key_file)
    app[KNOWN_OPTIONS] = KnownOptions()
    app[DRAIN] = Drain()
    app[CALLERS] = Callers(settings)
    app.on_response_prepare.append(add_headers)
    app[METRICS] = metrics or Metrics()
    app.cleanup_ctx.append(_workers)
    app.cleanup_ctx.append(_long_bodies)
    app.cleanup_ctx.append(watch_lag)
    if tracer is not None:
        app[TRACER] = tracer
        app.cleanup_ctx.append(_tracer)
    _add_routes(app)
    return app


def _add_routes(app: web.Application) -> None:
    for route in ROUTES:
        for path in route.spellings:
            add = app.router.add_get if route.method == "GET" else app.router.add_post
            add(path, route.handler)


async def _tracer(app: web.Application) -> AsyncIterator[None]:
    yield
    await asyncio.to_thread(app[TRACER].close)


async def _long_bodies(app: web.Application) -> AsyncIterator[None]:
    app[LONG_BODIES] = LongBodies()
    yield
    await app[LONG_BODIES].close()


async def _workers(app: web.Application) -> AsyncIterator[None]:
    pool = ThreadPoolExecutor(app[SETTINGS].worker_threads, thread_name_prefix="helix-gateway")
    app[WORKERS] = pool
    yield
    pool.shutdown(wait=False, cancel_futures=True)
