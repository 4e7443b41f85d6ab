"""From a request's bytes to its checked fields.

JSON is read in two strokes: the object's fields first, unread, then those that the schema knows.  So a field
that nobody knows costs nothing however large it is, and no field but the prompt may be large.  Knows nothing
about what the fields mean.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from aiohttp import web
from pydantic import ValidationError

from helix_gateway.gateway import envelope
from helix_gateway.gateway.envelope import Envelope, JsonError, Overlong, Wanted, read_envelope, read_value
from helix_gateway.gateway.errors import ApiError
from helix_gateway.gateway.known_options import KnownOptions, checked_prompt, key_of
from helix_gateway.gateway.long_bodies import limit_bytes
from helix_gateway.gateway.schemas.common import WireModel, unknown_in
from helix_gateway.gateway.state import KNOWN_OPTIONS, LONG_BODIES, in_worker, models_of, settings_of

INLINE_BYTES = 64 * 1024
"""Longer bodies are parsed in a worker thread: up to here it takes a fraction of a millisecond."""
LONG_BYTES = 1024 * 1024
"""Longer ones are taken apart in a process of their own: up to here that keeps Python's lock for 2 ms."""
MAX_FIELD_BYTES = 1024 * 1024
"""Any field but the prompt; 64 stop strings of 1,024 escaped characters fit."""

Schema = TypeVar("Schema", bound=WireModel)


@dataclass(frozen=True, slots=True)
class Body(Generic[Schema]):
    """A checked request and what it held beyond the schema."""

    fields: Schema
    """All but the prompt, which stands beside them; shared with other requests that say the same, so nobody changes them."""
    prompt: Any
    """What the schema's prompt field holds."""
    unknown: list[str]
    """Fields that the schema does not have, in the order in which they came."""
    overlooked: Sequence[str]
    """What `known_options.Checked` says of the fields that it has."""

    @property
    def ignored(self) -> list[str]:
        """Fields that change nothing, by path: those that nobody knows, and overruled ones."""
        return [*self.unknown, *self.overlooked, *unknown_in(self.fields.prompt_field, self.prompt)]


async def read_body(request: web.Request, schema: type[Schema]) -> Body[Schema]:
    """Read, parse and check the body.

    Raises:
        ApiError: 400 with the JSON path of what is wrong, 413.
        EngineUnavailableError: a long body cannot be read just now.
    """
    known = request.app[KNOWN_OPTIONS]
    pieces, size = await _receive(request, settings_of(request).max_body_bytes)
    if size > LONG_BYTES:
        opened = await _open_elsewhere(request, pieces, schema)
        return await in_worker(request, _checked, opened, schema, known)
    data = b"".join(pieces)
    if size > INLINE_BYTES:
        return await in_worker(request, parse_body, data, schema, known)
    return parse_body(data, schema, known)


async def _receive(request: web.Request, limit: int) -> tuple[list[bytes], int]:
    """The body in the pieces in which it comes, and their bytes in all."""
    pieces: list[bytes] = []
    size = request.content_length or 0
    if size <= limit:
        size = 0
        while size <= limit and (piece := await request.content.readany()):
            pieces.append(piece)
            size += len(piece)
    if size > limit:
        raise ApiError.too_large(limit)
    return pieces, size


async def _open_elsewhere(request: web.Request, pieces: list[bytes], schema: type[WireModel]) -> Envelope:
    context_tokens = models_of(request).longest_context
    limit = None if context_tokens is None else limit_bytes(context_tokens)
    wanted = Wanted(fields=_names(schema), bounded=schema.prompt_field, opening=schema.one_prompt, limit_bytes=limit)
    try:
        opened = await request.app[LONG_BODIES].read(pieces, wanted)
    except JsonError as error:
        raise _bad_json(error) from None
    if isinstance(opened, Overlong):
        raise _prompt_too_long(schema.prompt_field, opened.size_bytes, context_tokens)
    return opened


def _prompt_too_long(name: str, size: int, context_tokens: int | None) -> ApiError:
    return ApiError.bad_request(
        f"This model's maximum context length is {context_tokens} tokens, but `{name}` alone has {size} bytes, "
        "which no prompt of so many tokens has. Shorten the prompt.",
        param=name,
        code="context_length_exceeded",
    )


@lru_cache
def _names(schema: type[WireModel]) -> frozenset[str]:
    return frozenset(schema.model_fields)


def parse_body(data: bytes, schema: type[Schema], known: KnownOptions) -> Body[Schema]:
    """Parse and check a body, with what is ``known`` of earlier ones.

    Raises:
        ApiError: 400.
        pydantic.ValidationError: a field is of the wrong type or out of its bounds.
    """
    try:
        opened = read_envelope(data, Wanted(fields=_names(schema)))
    except JsonError as error:
        raise _bad_json(error) from None
    assert isinstance(opened, Envelope), "no bound was given"
    return _checked(opened, schema, known)


def _checked(opened: Envelope, schema: type[Schema], known: KnownOptions) -> Body[Schema]:
    unknown = [name for name in opened.others if name not in schema.inert_fields]
    key = key_of(schema, opened.fields)
    if (checked := known.find(key)) is not None:
        # What is wrong with the prompt is told by the checks of the whole.
        with suppress(ApiError, ValidationError, KeyError):
            return Body(checked.options, _prompt_alone(opened.fields, schema), unknown, checked.overlooked)
    request = schema.model_validate({name: _read_field(name, raw, schema) for name, raw in opened.fields.items()})
    options = request.without_prompt()
    checked = known.remember(key, options)
    return Body(options, getattr(request, schema.prompt_field), unknown, checked.overlooked)


def _prompt_alone(fields: Mapping[str, bytes], schema: type[WireModel]) -> Any:
    name = schema.prompt_field
    raw = fields[name]
    if len(raw) <= MAX_FIELD_BYTES and (prompt := schema.plain_prompt(raw)) is not None:
        return prompt
    value = _read_field(name, raw, schema)
    return value if name in schema.raw_fields else checked_prompt(schema, value)


def _read_field(name: str, value: bytes, schema: type[WireModel]) -> Any:
    if name in schema.raw_fields:
        return value
    if len(value) > MAX_FIELD_BYTES:
        outline = schema.large_fields.get(name)
        if outline is None:
            raise ApiError.bad_request(f"`{name}` has {len(value)} bytes; the limit is {MAX_FIELD_BYTES}.", param=name)
        read_json(value, outline, name)
    return read_json(value, read_value, name)


def read_json(data: bytes, read: Callable[[bytes], Any], path: str) -> Any:
    """Decode ``data`` with ``read``; what is wrong with it becomes a 400 that names the place below ``path``.

    Raises:
        ApiError: 400.
    """
    try:
        return envelope.read_json(data, read, path)
    except JsonError as error:
        raise _bad_json(error) from None


def _bad_json(error: JsonError) -> ApiError:
    place = f"`{error.path}`" if error.path else "The body"
    return ApiError.bad_request(f"{place} {error.problem}.", param=error.path or None)
