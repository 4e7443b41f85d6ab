"""`/v1/models`: what is served.

Knows nothing about how.
"""

from aiohttp import web

from helix_gateway.gateway.exchange import answer_json
from helix_gateway.gateway.registry import ServedModel
from helix_gateway.gateway.route import Response, Route
from helix_gateway.gateway.schemas.answers import Model, ModelList
from helix_gateway.gateway.state import models_of


async def list_models(request: web.Request) -> web.Response:
    """Every name that a request may give."""
    models = models_of(request)
    listing: ModelList = {"object": "list", "data": [describe(models.resolve(name), name) for name in models.names]}
    return answer_json(listing)


async def get_model(request: web.Request) -> web.Response:
    """One of them; ids hold slashes."""
    name = request.match_info["model_id"].rstrip("/")
    return answer_json(describe(models_of(request).resolve(name), name))


def describe(model: ServedModel, name: str) -> Model:
    """OpenAI's model object, with the context length once it is known."""
    body: Model = {
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


ROUTES = (
    Route(
        method="GET",
        path="/v1/models",
        handler=list_models,
        tag="OpenAI",
        summary="What is served",
        responses=(Response(description="Every name that a request may give.", schema=ModelList),),
    ),
    Route(
        method="GET",
        path="/v1/models/{model_id:.+}",
        handler=get_model,
        tag="OpenAI",
        summary="One model",
        parameters={"model_id": "A name that `/v1/models` lists; it may hold slashes."},
        responses=(Response(description="The model.", schema=Model),),
        errors=(404,),
    ),
)
