"""The one place where what went wrong becomes an HTTP status and OpenAI's error body.

Every other module raises; the middleware and the streams call `to_api_error`.  Knows nothing about routes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pydantic
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from helix_gateway.core.errors import (
    EngineUnavailableError,
    InvalidRequestError,
    OutOfMemoryError,
    QueueFullError,
    SlowReaderError,
)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
NO_RETRY = {"x-should-retry": "false"}


class GenerationFailedError(Exception):
    """The engine gave up on one sequence; its message is one clear line."""


@dataclass(slots=True, eq=False)
class ApiError(Exception):
    """A status and the fields of OpenAI's error object."""

    status: int
    message: str
    type: str = INVALID_REQUEST
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> bytes:
        """``{"error": {...}}`` as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> web.Response:
        """The error as an HTTP response of its own."""
        return web.Response(status=self.status, body=self.body(), headers=self.headers, content_type="application/json")

    @classmethod
    def bad_request(cls, message: str, *, param: str | None = None, code: str | None = None) -> "ApiError":
        """400: the request has to change before it can be served."""
        return cls(400, message, param=param, code=code, headers=NO_RETRY)

    @classmethod
    def model_not_found(cls, message: str) -> "ApiError":
        """404 for a name that no served model has."""
        return cls(404, message, param="model", code="model_not_found", headers=NO_RETRY)

    @classmethod
    def no_route(cls, message: str) -> "ApiError":
        """404 for a path that nothing answers at."""
        return cls(404, message, code="not_found", headers=NO_RETRY)

    @classmethod
    def too_large(cls, limit: int) -> "ApiError":
        """413 for a body over ``limit`` bytes."""
        return cls(413, f"The request's body is too large; the limit is {limit} bytes.", headers=NO_RETRY)

    @classmethod
    def forbidden(cls, message: str, *, code: str) -> "ApiError":
        """403 for an origin or a host that may not use this server."""
        return cls(403, message, code=code, headers=NO_RETRY)

    @classmethod
    def too_many(cls, message: str, headers: Mapping[str, str]) -> "ApiError":
        """429; ``headers`` say when to come again."""
        return cls(429, message, "rate_limit_error", code="rate_limit_exceeded", headers=headers)

    @classmethod
    def stopping(cls, retry_after_s: float) -> "ApiError":
        """503 once the server takes nothing new."""
        message = "The server is stopping and takes no new requests; try again in a moment."
        return cls(503, message, SERVER_ERROR, code="engine_unavailable", headers=wait(retry_after_s))

    @classmethod
    def timed_out(cls, limit_s: float) -> "ApiError":
        """504 for a request that took longer than it may; the same request would again."""
        message = f"The request took longer than the {limit_s:g} s that this server allows; ask for fewer tokens."
        return cls(504, message, SERVER_ERROR, code="request_timeout", headers=NO_RETRY)

    @classmethod
    def unauthorized(cls, message: str) -> "ApiError":
        """401 for a missing or a wrong key."""
        return cls(401, message, code="invalid_api_key", headers={**NO_RETRY, "WWW-Authenticate": "Bearer"})


def to_api_error(error: BaseException, *, request_id: str, retry_after_s: float) -> ApiError:
    """The status and body for any exception that a handler let out."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError.bad_request(str(error), param=error.param, code=error.code)
    if isinstance(error, pydantic.ValidationError):
        return from_validation(error)
    if isinstance(error, web.HTTPException):
        return _from_aiohttp(error)
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        return ApiError.bad_request("The request's body could not be read: it is not well-formed HTTP.")
    return _from_engine(error, request_id, retry_after_s)


def _from_engine(error: BaseException, request_id: str, retry_after_s: float) -> ApiError:
    if isinstance(error, QueueFullError):
        return ApiError.too_many(str(error), no_room(error.retry_after_s))
    if isinstance(error, EngineUnavailableError):
        return ApiError(503, str(error), SERVER_ERROR, None, "engine_unavailable", wait(retry_after_s))
    if isinstance(error, OutOfMemoryError):
        return ApiError(500, str(error), SERVER_ERROR, None, "out_of_memory", NO_RETRY)
    if isinstance(error, SlowReaderError):
        return ApiError(408, str(error), INVALID_REQUEST, None, "read_too_slowly", NO_RETRY)
    if isinstance(error, GenerationFailedError):
        return ApiError(500, f"{error} (request {request_id})", SERVER_ERROR)
    return ApiError(500, f"The server failed to handle this request (request {request_id}).", SERVER_ERROR)


def wait(seconds: float) -> dict[str, str]:
    """Headers that tell clients when to come again: whole seconds for most, milliseconds for OpenAI's SDKs."""
    return {"Retry-After": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, math.ceil(seconds * 1000)))}


def no_room(seconds: float) -> dict[str, str]:
    """Headers of a refusal that no rate explains: nothing is left now, look again then."""
    left = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": duration(seconds)}
    return {**wait(seconds), **left}


def duration(seconds: float) -> str:
    """A time as OpenAI's headers have it: ``20ms``, ``1.5s``, ``6m0s``; rounded up."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest_ms = divmod(milliseconds, 60_000)
    return f"{minutes}m{math.ceil(rest_ms / 1000)}s" if minutes else f"{rest_ms / 1000:g}s"


def _from_aiohttp(error: web.HTTPException) -> ApiError:
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"Method {error.method} is not allowed on this route; allowed: {allowed}."
        return ApiError(405, message, code="method_not_allowed", headers={**NO_RETRY, "Allow": allowed})
    if isinstance(error, web.HTTPNotFound):
        return ApiError.no_route("There is no such route; GET / tells which there are.")
    return ApiError(error.status, error.reason, INVALID_REQUEST if error.status < 500 else SERVER_ERROR)


# ---- pydantic's findings in OpenAI's words -----------------------------------------------------------------

_EXPECTED = {
    "float_type": "a number",
    "int_type": "an integer",
    "string_type": "a string",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}
_PARSED = {
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "int_parsing": "an integer",
    "int_parsing_size": "a smaller integer",
    "int_from_float": "an integer",
    "bool_parsing": "true or false",
}
"""Where a text or a number was to be read as something."""
_KINDS = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "an array",
    dict: "an object",
    type(None): "null",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
_LENGTHS = {
    "too_long": ("at most {max_length} items", "it has {actual_length}"),
    "too_short": ("at least {min_length} item", "it has {actual_length}"),
    "string_too_long": ("at most {max_length} characters", "it is longer"),
    "string_too_short": ("at least {min_length} character", "it is empty"),
}


def kind_of(value: object) -> str:
    """What JSON calls a value: "a string", "an array", …"""
    return _KINDS.get(type(value), "something else")


def json_path(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "content")`` → ``messages[0].content``; names of union branches (``<…>``) are left out."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<"):
            path += f".{step}" if path else step
    return path


def from_validation(error: pydantic.ValidationError) -> ApiError:
    """The first finding, as a 400 that names the JSON path and the bound."""
    finding = error.errors(include_url=False)[0]
    context = finding.get("ctx", {})
    path = json_path((*finding["loc"], *([context["field"]] if "field" in context else [])))
    problem = problem_of(finding)
    return ApiError.bad_request(f"`{path}` {problem}." if path else f"The body {problem}.", param=path or None)


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:40]


def problem_of(finding: Mapping[str, Any]) -> str:
    """One of pydantic's findings as the end of a sentence that begins with the field's name."""
    kind, value, context = finding["type"], finding["input"], finding.get("ctx", {})
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, not {kind_of(value)}"
    if kind in _PARSED:
        return f"must be {_PARSED[kind]}, not {str(value)[:40]!r}"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"must be {words} {_number(context[key])}, not {_number(value)}"
    if kind in _LENGTHS:
        wanted, found = _LENGTHS[kind]
        return f"must have {wanted.format(**context)}; {found.format(**context)}"
    if kind == "missing":
        return "is required"
    if kind == "literal_error":
        return f"must be {context['expected']}, not {str(value)[:40]!r}"
    return str(context["error"]).rstrip(".") if kind == "value_error" else str(finding["msg"])
