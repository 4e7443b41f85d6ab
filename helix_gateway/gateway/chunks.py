"""Chunks of a stream as bytes: what is the same in each is encoded once, the rest without building objects.

Knows the common frame; `routes/` knows what chat and completions put into it.
"""

import msgspec

from helix_gateway.gateway.reply import Reply
from helix_gateway.gateway.schemas.answers import Usage
from helix_gateway.gateway.sse import one_line

to_json = msgspec.json.Encoder().encode


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
