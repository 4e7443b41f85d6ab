"""A process that takes one long body apart and ends: what is wanted comes as a line of JSON, the body after it.

Its answer begins with a head, which says how long the values are; those follow it as they lie in the body.  Run by
`long_bodies.py`.  It imports msgspec and little else, so that it starts in some 50 ms.
"""

import signal
import sys
from contextlib import suppress

import msgspec

from helix_gateway.gateway.envelope import Envelope, JsonError, Overlong, Wanted, read_envelope

LENGTH_BYTES = 8
"""An answer's first bytes: the length of its head, most significant byte first."""


class Malformed(msgspec.Struct, frozen=True, tag=True):
    """The body is no JSON; as a `JsonError`."""

    path: str
    problem: str


class Contents(msgspec.Struct, frozen=True, tag=True):
    """An `Envelope` without its values, which follow one behind another."""

    sizes: dict[str, int]
    """Bytes of each value, in the order of `Envelope.fields`."""
    others: list[str]


decode_head = msgspec.msgpack.Decoder(Contents | Overlong | Malformed).decode


def main() -> None:
    """Read from standard input until its end, answer on standard output."""
    # Ctrl-C, and a service manager's SIGTERM, reach the whole group; the gateway, which may still finish what is in
    # flight, decides when to stop, and then standard input ends.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    _widen(sys.stdout.fileno())
    asked = sys.stdin.buffer.readline()
    if not asked:  # nobody needs it any more
        return
    try:
        answer = read_envelope(sys.stdin.buffer.read(), msgspec.json.decode(asked, type=Wanted))
    except JsonError as error:
        _write(Malformed(error.path, error.problem))
    else:
        _write(answer)


def _widen(pipe: int) -> None:
    """Let a pipe hold a megabyte, where that can be had: fewer turns of the gateway's loop are needed to empty it."""
    if sys.platform == "linux":
        import fcntl

        with suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1024 * 1024)


def _write(answer: Envelope | Overlong | Malformed) -> None:
    values: list[bytes] = []
    head: Contents | Overlong | Malformed
    if isinstance(answer, Envelope):
        values = list(answer.fields.values())
        head = Contents({name: len(value) for name, value in answer.fields.items()}, answer.others)
    else:
        head = answer
    encoded = msgspec.msgpack.encode(head)
    sys.stdout.buffer.writelines([len(encoded).to_bytes(LENGTH_BYTES, "big"), encoded, *values])


if __name__ == "__main__":
    main()
