"""`/openapi.json`: the routes and their schemas as an OpenAPI 3.1 document.

Made from `Route` and from the types that requests are checked with and answers written by; nothing is described
twice.  Events of a stream have no place in OpenAPI 3.1: their schema stands beside the media type as
``x-event-schema``.  Knows nothing about any one route.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from helix_gateway import __version__
from helix_gateway.gateway.chunks import to_json
from helix_gateway.gateway.route import EVENTS, JSON, Response, Route
from helix_gateway.gateway.schemas.answers import Error

Document = dict[str, Any]

ABOUT = """Helix serves language models through OpenAI's API: any client that speaks to OpenAI can speak to it.

Every path answers with and without `/v1` before it, and a slash at its end is forgiven. A field that is null counts
as absent. Fields that Helix does not know are accepted and named in the response header `x-helix-ignored-fields`.

Streams are server-sent events: `data:` and a JSON object each, the last one `data: [DONE]`; a line that begins with a
colon only keeps the connection open. Trouble before the first event is an ordinary error with its status; after it,
the last event is `{"error": …}` and no `[DONE]` follows; a client that reads too slowly is let go that way, with the
code `read_too_slowly`."""

TAGS = {
    "OpenAI": "What OpenAI's clients ask.",
    "Helix": "One prompt, one text, and how it was made, without OpenAI's envelope.",
    "Server": "How the server is, and what it can do.",
}

ERRORS = {
    400: "The request must change: `param` is the JSON path of what is wrong, the message has its bound. The code "
    "`context_length_exceeded` says that the prompt alone does not fit.",
    401: "A key is needed, or the one that was sent is wrong.",
    403: "The page's origin or the host name may not use this server.",
    404: "There is nothing of that name here; of a model that is not served the code is `model_not_found`.",
    413: "The body is over the server's limit.",
    429: "The queue is full, or the key is over its rate; nothing was computed. `Retry-After` says when to come again.",
    500: "The server's own fault; the message has the request's id.",
    503: "The engine is loading, restarting or gone, or the server is about to stop. `Retry-After` says when to come "
    "again.",
    504: "The request took longer than the server allows; the same request would again.",
}
EVERYWHERE = (403, 500)

HEADERS = {
    "x-request-id": "The request's id: the client's own where it sent a sane one.",
    "openai-processing-ms": "Milliseconds until the answer began.",
    "Retry-After": "Seconds after which to come again.",
    "retry-after-ms": "The same in milliseconds.",
    "x-ratelimit-limit-requests": "Requests of a minute; told where the server limits them.",
    "x-ratelimit-remaining-requests": "How many of them are left.",
    "x-ratelimit-reset-requests": "Until all of them are there again, like `1.5s`.",
    "x-ratelimit-limit-tokens": "Tokens of a minute; told where the server limits them.",
    "x-ratelimit-remaining-tokens": "How many of them are left.",
    "x-ratelimit-reset-tokens": "Until all of them are there again.",
    "x-should-retry": "`false` where trying again cannot help.",
    "x-helix-seed": "The seed with which this answer can be had again.",
    "x-helix-clamped": "What was cut to what the context had left.",
    "x-helix-ignored-fields": "Fields of the request that Helix does not know.",
}
ALWAYS = ("x-request-id", "openai-processing-ms")
RETRY = ("Retry-After", "retry-after-ms")


class OpenApi:
    """The routes of one server, and their document once someone asks for it."""

    def __init__(self, routes: Sequence[Route], *, model: str) -> None:
        """``model`` is a served name, for examples."""
        self.routes = routes
        self.open_handlers = frozenset(route.handler for route in routes if route.open)
        """Who answers without a key."""
        self._model = model

    @cached_property
    def json(self) -> bytes:
        """The document; the first call takes some tens of milliseconds."""
        return to_json(describe(self.routes, self._model))


def describe(routes: Sequence[Route], model: str) -> Document:
    """The whole document; ``model`` is the name that examples give."""
    schemas, components = _schemas(routes)
    paths: dict[str, Document] = {}
    for route in routes:
        operation = _operation(route, schemas, model)
        if not route.open:
            operation["security"] = [{"key": []}, {}]
        paths.setdefault(route.told_path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Helix", "version": __version__, "description": ABOUT, "license": LICENSE},
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {**_shared(), "schemas": components},
    }


LICENSE = {"name": "Apache-2.0", "identifier": "Apache-2.0"}


class _Schemas(GenerateJsonSchema):
    """Without titles that only repeat a field's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _schemas(routes: Iterable[Route]) -> tuple[dict[Any, Document], dict[str, Document]]:
    """A reference for each type, and what the references point at."""
    types: dict[Any, None] = {Error: None}
    for route in routes:
        told = (route.request, *(answer.schema for answer in route.responses))
        types.update(dict.fromkeys(kind for kind in told if kind is not None))
    mode: JsonSchemaMode = "validation"
    references, definitions = TypeAdapter.json_schemas(
        [(kind, mode, TypeAdapter(kind)) for kind in types],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Schemas,
    )
    return {kind: references[kind, mode] for kind in types}, definitions["$defs"]


def _operation(route: Route, schemas: dict[Any, Document], model: str) -> Document:
    operation: Document = {
        "operationId": route.handler.__name__,
        "tags": [route.tag],
        "summary": route.summary,
        "description": route.description,
    }
    if route.parameters:
        operation["parameters"] = [_path_parameter(*parameter) for parameter in route.parameters.items()]
    if route.request is not None:
        operation["requestBody"] = _request_body(route, schemas[route.request], model)
    operation["responses"] = _responses(route, schemas)
    return operation


def _path_parameter(name: str, description: str) -> Document:
    return {"name": name, "in": "path", "required": True, "description": description, "schema": {"type": "string"}}


def _request_body(route: Route, schema: Document, model: str) -> Document:
    examples = {
        example.summary: {"summary": example.summary, "value": {"model": model, **example.body}}
        for example in route.examples
    }
    return {"required": True, "content": {JSON: {"schema": schema, "examples": examples}}}


def _responses(route: Route, schemas: dict[Any, Document]) -> Document:
    responses: Document = {}
    for answer in route.responses:
        status = str(answer.status)
        response = responses.setdefault(
            status,
            {"description": answer.description, "headers": _headers(*ALWAYS, *route.headers), "content": {}},
        )
        response["content"][answer.media_type] = _content(answer, schemas)
    for code in sorted((*EVERYWHERE, *route.errors, *(() if route.open else (401,)))):
        responses.setdefault(str(code), _error_reference(code))
    return responses


def _content(answer: Response, schemas: dict[Any, Document]) -> Document:
    if answer.media_type == JSON:
        return {"schema": schemas[answer.schema]}
    if answer.media_type == EVENTS:
        return {"x-event-schema": schemas[answer.schema]}
    return {"schema": {"type": "string"}}


def _headers(*names: str) -> Document:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _error_reference(status: int) -> Document:
    return {"$ref": f"#/components/responses/{status}"}


def _shared() -> Document:
    error = {"$ref": "#/components/schemas/Error"}
    return {
        "securitySchemes": {
            "key": {"type": "http", "scheme": "bearer", "description": "Needed only where the operator has set a key."}
        },
        "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()},
        "responses": {
            str(status): {
                "description": text,
                "headers": _headers(*ALWAYS, "x-should-retry", *(RETRY if status in (429, 503) else ())),
                "content": {JSON: {"schema": error}},
            }
            for status, text in ERRORS.items()
        },
    }
