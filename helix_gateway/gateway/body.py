"""From a request's bytes to its checked fields.

JSON is read in two strokes: the object's fields first, unread, then those that the schema knows.  So a field
that nobody knows costs nothing however large it is, and no field but the prompt may be large.  Knows nothing
about what the fields mean.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from aiohttp import web

from helix_gateway.gateway.errors import ApiError
from helix_gateway.gateway.long_bodies import holds_long_value, limit_bytes
from helix_gateway.gateway.schemas.common import WireModel
from helix_gateway.gateway.state import in_worker, models_of, settings_of

INLINE_BYTES = 64 * 1024
"""Longer bodies are parsed in a worker thread: up to here it takes a fraction of a millisecond."""
MAX_FIELD_BYTES = 1024 * 1024
"""Any field but the prompt; 64 stop strings of 1,024 escaped characters fit."""

EXACT_INTEGERS = 2**53
"""Up to here a float holds every integer."""

Schema = TypeVar("Schema", bound=WireModel)


def _number(text: str) -> float:
    """JSON has one kind of number: ``16.0`` is an integer too, for some languages write every number so."""
    value = float(text)
    return int(value) if abs(value) <= EXACT_INTEGERS and value.is_integer() else value


_read_envelope = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
read_value = msgspec.json.Decoder(float_hook=_number).decode
"""A JSON text as Python has it."""
_msgspec_path = re.compile(r" - at `\$(?P<path>.*)`$")
_half_pair = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")


@dataclass(frozen=True, slots=True)
class Body(Generic[Schema]):
    """A checked request and what it held beyond the schema."""

    fields: Schema
    ignored: list[str]
    """Fields that change nothing, by path: those that nobody knows, in the order in which they came, and overruled ones."""


async def read_body(request: web.Request, schema: type[Schema]) -> Body[Schema]:
    """Read, parse and check the body.

    Raises:
        ApiError: 400 with the JSON path of what is wrong, 413.
    """
    limit = settings_of(request).max_body_bytes
    if (request.content_length or 0) > limit:
        raise ApiError.too_large(limit)
    try:
        data = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise ApiError.too_large(limit) from error
    if len(data) <= INLINE_BYTES:
        return parse_body(data, schema)
    return await in_worker(request, _parse_long_body, data, schema, models_of(request).longest_context)


def _parse_long_body(data: bytes, schema: type[Schema], longest_context: int | None) -> Body[Schema]:
    if longest_context is not None and schema.prompt_field is not None:
        limit = limit_bytes(longest_context)
        if len(data) > limit and holds_long_value(data, schema.prompt_field, schema.prompt_opening, limit):
            raise _prompt_too_long(schema.prompt_field, limit, longest_context)
    return parse_body(data, schema)


def _prompt_too_long(name: str, limit: int, context_tokens: int) -> ApiError:
    return ApiError.bad_request(
        f"This model's maximum context length is {context_tokens} tokens, but `{name}` alone has more than {limit} bytes, "
        "which no prompt of so many tokens has. Shorten the prompt.",
        param=name,
        code="context_length_exceeded",
    )


def parse_body(data: bytes, schema: type[Schema]) -> Body[Schema]:
    """Parse and check a body.

    Raises:
        ApiError: 400.
        pydantic.ValidationError: a field is of the wrong type or out of its bounds.
    """
    values: dict[str, Any] = {}
    unknown: list[str] = []
    for name, raw in read_json(data, _read_envelope, "").items():
        size = len(memoryview(raw))
        if size == len(b"null") and bytes(raw) == b"null":
            continue
        if name in schema.raw_fields:
            values[name] = raw
        elif name in schema.model_fields:
            values[name] = _read_field(name, raw, size, schema)
        elif name not in schema.inert_fields:
            unknown.append(name)
    fields = schema.model_validate(values)
    return Body(fields, unknown + fields.overruled() + fields.unknown_below())


def _read_field(name: str, raw: msgspec.Raw, size: int, schema: type[WireModel]) -> Any:
    if size > MAX_FIELD_BYTES:
        outline = schema.large_fields.get(name)
        if outline is None:
            raise ApiError.bad_request(f"`{name}` has {size} bytes; the limit is {MAX_FIELD_BYTES}.", param=name)
        read_json(raw, outline, name)
    return read_json(raw, read_value, name)


def read_json(data: bytes | msgspec.Raw, read: Callable[[Any], Any], path: str) -> Any:
    """Decode ``data`` with ``read``; what is wrong with it becomes a 400 that names the place below ``path``.

    Raises:
        ApiError: 400.
    """
    try:
        return read(data)
    except RecursionError:
        problem = "is nested too deeply"
    except UnicodeDecodeError:
        problem = "is not valid UTF-8"
    except msgspec.DecodeError as error:
        found = _msgspec_path.search(str(error))
        if found:
            path = (path + found["path"].replace("[...]", "")).lstrip(".")
        problem = _json_problem(error, memoryview(data))
    raise ApiError.bad_request(f"`{path}` {problem}." if path else f"The body {problem}.", param=path or None)


def _json_problem(error: msgspec.DecodeError, data: memoryview) -> str:
    message = str(error)
    truncated = "truncated" in message
    # A half pair at the very end reads as an input cut short: the other half is missed first.
    if "surrogate" in message or (truncated and _half_pair.search(data[-32:])):
        return "holds half of a surrogate pair (a \\u escape between d800 and dfff that stands alone)"
    if isinstance(error, msgspec.ValidationError):
        message = _msgspec_path.sub("", message)
        return "cannot be read: " + message[:1].lower() + message[1:].replace("`", "")
    if truncated:
        return "is not valid JSON: it ends too early" if len(data) else "is empty; a JSON object is expected"
    return "is not valid JSON: " + message.removeprefix("JSON is malformed: ")
