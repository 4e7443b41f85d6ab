"""A look at a long body that nobody reads yet: does it hold a prompt that no served model has room for?

msgspec reads JSON in one call, which keeps Python's lock, and with it the event loop, for about 3 ms a megabyte where
strings are full of escapes.  A prompt far too long is therefore found by walking over the body in small steps: from
quote to quote and from bracket to bracket, no further than the bound.  What the walk cannot tell, it leaves to the
parser.  Knows JSON's brackets and quotes, and nothing about what the fields mean.
"""

import re

BYTES_PER_TOKEN = 64
"""More JSON than this for each token of the context is no prompt that fits: text has about 4."""
MIN_LIMIT_BYTES = 1024 * 1024
"""Below this, parsing is quick enough whatever it is."""
MAX_STEPS = 40_000
"""Quotes, brackets and plain objects that are looked at, about a microsecond each."""

_SLICE_BYTES = 64 * 1024
_QUOTE = ord(b'"')
_content = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
# What most messages are: an object of strings and numbers, passed in one step.
_plain_object = re.compile(rb'\{[^{}\[\]"]*(?:"[^"\\]*(?:\\.[^"\\]*)*"[^{}\[\]"]*)*\}', re.DOTALL)
_mark = re.compile(rb'["\[\]{}]')


def limit_bytes(context_tokens: int) -> int:
    """How long a prompt may be in JSON where the longest context is so many tokens."""
    return max(MIN_LIMIT_BYTES, context_tokens * BYTES_PER_TOKEN)


def holds_long_value(data: bytes, name: str, opening: bytes, limit: int) -> bool:
    """Whether a field of the outermost object is seen to take more than ``limit`` bytes.

    Args:
        name: the field's.
        opening: how its value must begin, without spaces: ``b'"'`` for a string, ``b"[{"`` for an array of objects.
    """
    key = name.encode()
    depth = position = 0
    start: int | None = None
    for _ in range(MAX_STEPS):
        position = _next_mark(data, position)
        if position < len(data) and data[position] == _QUOTE:
            end = _end_of_string(data, position + 1, limit)
            if depth == 1 and _next_byte(data, end) == b":":
                start = end if data[position + 1 : end - 1] == key and _opens(data, end, opening) else None
            position = end
        elif depth > 1 and (plain := _plain_object.match(data, position, position + _SLICE_BYTES)):
            position = plain.end()
        elif position < len(data):
            depth += 1 if data[position] in b"[{" else -1
            position += 1
        if start is not None and position - start > limit:
            return True
        if position >= len(data):
            break
    return False


def _next_mark(data: bytes, position: int) -> int:
    """Where the next quote or bracket is; the end where there is none."""
    while position < len(data):
        found = _mark.search(data, position, position + _SLICE_BYTES)
        if found:
            return found.start()
        position += _SLICE_BYTES
    return len(data)


def _end_of_string(data: bytes, position: int, most: int) -> int:
    """The place behind the closing quote of a string that begins at ``position``, or one more than ``most`` bytes on."""
    begin = position
    while position < len(data) and position - begin <= most:
        found = _content.match(data, position, position + _SLICE_BYTES)
        assert found is not None, "it matches nothing too"
        if found.end() < len(data) and data[found.end()] == _QUOTE:
            return found.end() + 1
        # Here a slice ends, perhaps between a backslash and what it escapes; or the body does.
        position = found.end() if found.end() > position else len(data)
    return position


def _next_byte(data: bytes, position: int) -> bytes:
    return data[position : position + 64].lstrip()[:1]


def _opens(data: bytes, position: int, opening: bytes) -> bool:
    """Whether the value behind a key that ends at ``position`` begins as wished."""
    return data[position : position + 256].translate(None, b": \t\r\n").startswith(opening)
