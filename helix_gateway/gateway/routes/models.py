"""`/v1/models`: what is served.

Knows nothing about how.
"""

from typing import Any

from aiohttp import web

from helix_gateway.gateway.chunks import to_json
from helix_gateway.gateway.registry import ServedModel
from helix_gateway.gateway.state import models_of


async def list_models(request: web.Request) -> web.Response:
    """Every name that a request may give."""
    models = models_of(request)
    data = [describe(models.resolve(name), name) for name in models.names]
    return web.Response(body=to_json({"object": "list", "data": data}), content_type="application/json")


async def get_model(request: web.Request) -> web.Response:
    """One of them; ids hold slashes."""
    name = request.match_info["model_id"].rstrip("/")
    body = describe(models_of(request).resolve(name), name)
    return web.Response(body=to_json(body), content_type="application/json")


def describe(model: ServedModel, name: str) -> dict[str, Any]:
    """OpenAI's model object, with the context length once it is known."""
    body: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "helix",
        "root": model.name,
        "parent": None,
    }
    if model.service.state == "ready":
        body["max_model_len"] = model.service.max_model_len
    return body
