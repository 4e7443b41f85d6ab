"""A process that takes one long body apart and ends: what is wanted comes as a line of JSON, the body after it.

Run by `long_bodies.py`.  It imports msgspec and little else, so that it starts in some 50 ms.
"""

import sys

import msgspec

from helix_gateway.gateway.envelope import Envelope, JsonError, Overlong, Wanted, read_envelope


class Malformed(msgspec.Struct, frozen=True, tag=True):
    """The body is no JSON; as a `JsonError`."""

    path: str
    problem: str


decode_answer = msgspec.msgpack.Decoder(Envelope | Overlong | Malformed).decode


def main() -> None:
    """Read from standard input until its end, answer on standard output."""
    asked = sys.stdin.buffer.readline()
    if not asked:  # nobody needs it any more
        return
    answer: Envelope | Overlong | Malformed
    try:
        answer = read_envelope(sys.stdin.buffer.read(), msgspec.json.decode(asked, type=Wanted))
    except JsonError as error:
        answer = Malformed(error.path, error.problem)
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    main()
