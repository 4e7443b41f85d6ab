"""The aiohttp application: routes, middlewares, and what must be closed at the end.

Knows nothing about sockets (`server.py`) nor about where engines run: it is given services.
"""

from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web
from aiohttp.typedefs import Handler

from helix_gateway.gateway.loop_lag import watch_lag
from helix_gateway.gateway.middlewares import MIDDLEWARES, add_headers
from helix_gateway.gateway.registry import ModelRegistry
from helix_gateway.gateway.routes import chat, completions, generate, health, models, root
from helix_gateway.gateway.routes import metrics as metrics_route
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.gateway.state import METRICS, MODELS, SETTINGS, WORKERS
from helix_gateway.service.api import ModelService
from helix_gateway.telemetry.metrics import Metrics

PREFIXES = ("", "/v1")
"""People set ``base_url`` with and without it."""

POSTS: dict[str, Handler] = {
    "/chat/completions": chat.create_chat_completion,
    "/completions": completions.create_completion,
    "/generate": generate.generate,
    "/generate/stream": generate.generate_stream,
}
GETS: dict[str, Handler] = {
    "": root.root,
    "/models": models.list_models,
    "/health": health.health,
    "/ready": health.ready,
    "/metrics": metrics_route.scrape,
}


def create_app(
    settings: GatewaySettings, models: Mapping[str, ModelService], metrics: Metrics | None = None
) -> web.Application:
    """The gateway over ``models``: names that clients may ask for, several of one service being aliases.

    Services are used as they are: whoever made them starts and stops them (``app.cleanup_ctx`` is a good place).
    ``metrics`` are those that their observers keep.
    """
    app = web.Application(middlewares=MIDDLEWARES, client_max_size=settings.max_body_bytes)
    app[SETTINGS] = settings
    app[MODELS] = ModelRegistry(models, settings.served_model_names)
    app.on_response_prepare.append(add_headers)
    app[METRICS] = metrics or Metrics()
    app.cleanup_ctx.append(_workers)
    app.cleanup_ctx.append(watch_lag)
    _add_routes(app)
    return app


def _add_routes(app: web.Application) -> None:
    for prefix in PREFIXES:
        for path, handler in GETS.items():
            for spelling in _spellings(prefix + path):
                app.router.add_get(spelling, handler)
        for path, handler in POSTS.items():
            for spelling in _spellings(prefix + path):
                app.router.add_post(spelling, handler)
        app.router.add_get(prefix + "/models/{model_id:.+}", models.get_model)


def _spellings(path: str) -> tuple[str, ...]:
    """With and without a slash at the end."""
    return (path, path + "/") if path else ("/",)


async def _workers(app: web.Application) -> AsyncIterator[None]:
    pool = ThreadPoolExecutor(app[SETTINGS].worker_threads, thread_name_prefix="helix-gateway")
    app[WORKERS] = pool
    yield
    pool.shutdown(wait=False, cancel_futures=True)
