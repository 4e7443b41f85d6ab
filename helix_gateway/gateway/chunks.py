"""Chunks of a stream as bytes: what is the same in each is encoded once, the rest without building objects.

Knows the common frame; `routes/` knows what chat and completions put into it.
"""

import msgspec

from helix_gateway.gateway.reply import Reply
from helix_gateway.gateway.schemas.answers import Usage
from helix_gateway.gateway.sse import one_line

to_json = msgspec.json.Encoder().encode
_PIECE_ITEMS = 32
_CHOICES = "choices"


def in_pieces(value: object) -> bytes:
    """The JSON that `to_json` makes, an array's items a few at a time.

    One call of the encoder keeps Python's lock until it is done: 20 ms for the logprobs of 8,192 tokens with 20
    alternatives each.  Between two pieces the event loop has its turn, wherever this runs in a worker thread.
    """
    if isinstance(value, dict):
        return b"{" + b",".join(to_json(name) + b":" + _field(name, item) for name, item in value.items()) + b"}"
    if isinstance(value, list) and len(value) > _PIECE_ITEMS:
        starts = range(0, len(value), _PIECE_ITEMS)
        return b"[" + b",".join(to_json(value[start : start + _PIECE_ITEMS])[1:-1] for start in starts) + b"]"
    return to_json(value)


def _field(name: str, value: object) -> bytes:
    # Each choice may be as long as the whole answer.
    if name == _CHOICES and isinstance(value, list):
        return b"[" + b",".join(map(in_pieces, value)) + b"]"
    return in_pieces(value)


class ChunkFrame:
    """The frame around one choice: ``data: {identity, "choices": [{"index": i, <fields>}], …}``."""

    def __init__(self, reply: Reply, object_name: str, *, usage: bytes = b"") -> None:
        """``usage`` is what each chunk says of usage: nothing, or ``NO_USAGE_YET`` where it was asked for."""
        self._fields = reply.fields(object_name)
        self._head = b"data: " + to_json(self._fields)[:-1] + b',"choices":[{"index":'
        self._tail = usage + b"}\n\n"

    def chunk(self, choice: int, fields: bytes, beside: bytes = b"") -> bytes:
        """One event; ``fields`` are the choice's, ``beside`` (with a leading comma) stand next to the choices."""
        return b"%b%d,%b}]%b%b" % (self._head, choice, one_line(fields), one_line(beside), self._tail)

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event with no choices that tells the usage."""
        return b"data: " + to_json({**self._fields, "choices": [], "usage": usage}) + b"\n\n"


NO_USAGE_YET = b',"usage":null'
