"""JSON as clients send it: the outermost object's fields first, unread; values when somebody asks for them.

What is wrong with a text is told by the place in it.  Imports nothing heavy, since a process of its own does this for
long bodies (`envelope_process.py`).  Knows nothing about HTTP nor about what fields mean.
"""

import re
from collections.abc import Callable
from typing import Any

import msgspec

EXACT_INTEGERS = 2**53
"""Up to here a float holds every integer."""


class JsonError(Exception):
    """A text is not the JSON that was expected.

    Args:
        path: where, as ``messages[0].content``; empty for the whole.
        problem: what is wrong, as the rest of a sentence that begins with the place.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be taken out of an object."""

    fields: frozenset[str]
    bounded: str | None = None
    """The field that may not be longer than `limit_bytes`, if it begins as `opening` says."""
    opening: str = ""
    """A regular expression."""
    limit_bytes: int | None = None


class Envelope(msgspec.Struct, frozen=True, tag=True):
    """An object's fields, without those that are null."""

    fields: dict[str, bytes]
    """Those that were wanted, as they lie in the text, in their order."""
    others: list[str]
    """The names of the rest, in their order."""


class Overlong(msgspec.Struct, frozen=True, tag=True):
    """An object of which a field is longer than its limit."""

    size_bytes: int


def _number(text: str) -> float:
    """JSON has one kind of number: ``16.0`` is an integer too, for some languages write every number so."""
    value = float(text)
    return int(value) if abs(value) <= EXACT_INTEGERS and value.is_integer() else value


_read_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
read_value = msgspec.json.Decoder(float_hook=_number).decode
"""A JSON text as Python has it."""
_msgspec_path = re.compile(r" - at `\$(?P<path>.*)`$")
_half_pair = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")


def read_envelope(data: bytes, wanted: Wanted) -> Envelope | Overlong:
    """Take an object apart.

    Raises:
        JsonError: it is no JSON, or no object.
    """
    fields, others = {}, []
    for name, raw in read_json(data, _read_fields, "").items():
        value = memoryview(raw)
        if name == wanted.bounded and _too_long(value, wanted):
            return Overlong(len(value))
        if value[:4].tobytes() == b"null":
            continue
        if name in wanted.fields:
            fields[name] = value.tobytes()
        else:
            others.append(name)
    return Envelope(fields, others)


def _too_long(value: memoryview, wanted: Wanted) -> bool:
    too_long = wanted.limit_bytes is not None and len(value) > wanted.limit_bytes
    return too_long and re.match(wanted.opening.encode(), value) is not None


def read_json(data: bytes, read: Callable[[Any], Any], path: str) -> Any:
    """Decode ``data`` with ``read``; what is wrong with it is told by the place below ``path``.

    Raises:
        JsonError: it cannot be read.
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
        problem = _json_problem(error, data)
    raise JsonError(path, problem)


def _json_problem(error: msgspec.DecodeError, data: bytes) -> str:
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
