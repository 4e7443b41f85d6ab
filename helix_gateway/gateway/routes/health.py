"""`/health` and `/ready`: for probes and supervisors.

Knows nothing about why an engine is in the state it is in.
"""

from aiohttp import web

from helix_gateway.gateway.chunks import to_json
from helix_gateway.gateway.errors import wait
from helix_gateway.gateway.route import Response, Route
from helix_gateway.gateway.schemas.answers import ModelState, ServerState
from helix_gateway.gateway.state import DRAIN, models_of, settings_of


async def health(request: web.Request) -> web.Response:
    """200 for as long as the process lives, whatever its engines do."""
    return _states(request, 200, "ok")


async def ready(request: web.Request) -> web.Response:
    """200 when a request would be served now, 503 with the reason otherwise."""
    waiting = [model for model in models_of(request).models if model.service.state != "ready"]
    draining = request.app[DRAIN].draining
    if not waiting and not draining:
        return _states(request, 200, "ready")
    reason = "draining" if draining else "; ".join(f"{model.name} is {model.service.state}" for model in waiting)
    response = _states(request, 503, reason)
    response.headers.update(wait(settings_of(request).retry_after_s))
    return response


def _states(request: web.Request, status: int, text: str) -> web.Response:
    models: list[ModelState] = [{"id": model.name, "state": model.service.state} for model in models_of(request).models]
    body: ServerState = {"status": text, "models": models}
    return web.Response(status=status, body=to_json(body), content_type="application/json")


ROUTES = (
    Route(
        method="GET",
        path="/health",
        handler=health,
        tag="Server",
        open=True,
        summary="200 while the process lives",
        responses=(Response(description="It lives, whatever its engines do.", schema=ServerState),),
    ),
    Route(
        method="GET",
        path="/ready",
        handler=ready,
        tag="Server",
        open=True,
        summary="200 when a request would be served now",
        responses=(
            Response(description="A request would be served.", schema=ServerState),
            Response(description="It would not; `status` says why.", status=503, schema=ServerState),
        ),
    ),
)
