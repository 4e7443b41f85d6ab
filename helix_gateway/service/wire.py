"""Commands and replies as bytes on a socket between two processes of one user.

On Unix the socket is a file in a folder that only this user may enter; where there are no such sockets, a loopback
port.  One PUSH to one PULL in each direction.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from helix_gateway.core.event import TokenEvent
from helix_gateway.service.messages import Command, Events, Reply

command_encoder = msgspec.msgpack.Encoder()
command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


MAX_PROMPT_LOGPROBS = 256
"""Of one message: whoever reads it does so in one go, about a millisecond with 20 alternatives each."""

_encode_reply = msgspec.msgpack.Encoder().encode


def encoded(reply: Reply) -> Iterator[bytes]:
    """A reply as messages; one, but for the logprobs of a long prompt, of which parts go ahead."""
    if isinstance(reply, Events):
        for place, event in enumerate(reply.events):
            if event.prompt_logprobs is not None and len(event.prompt_logprobs) > MAX_PROMPT_LOGPROBS:
                *parts, last = _parts(event)
                yield from (_encode_reply(Events([part])) for part in parts)
                reply = Events([*reply.events[:place], last, *reply.events[place + 1 :]])
    yield _encode_reply(reply)


def _parts(event: TokenEvent) -> Iterator[TokenEvent]:
    """Events of prompt logprobs alone, and the event itself with the rest of them."""
    logprobs = event.prompt_logprobs or []
    last_start = (len(logprobs) - 1) // MAX_PROMPT_LOGPROBS * MAX_PROMPT_LOGPROBS
    for start in range(0, last_start, MAX_PROMPT_LOGPROBS):
        piece = logprobs[start : start + MAX_PROMPT_LOGPROBS]
        yield TokenEvent(request_id=event.request_id, index=event.index, token_ids=[], prompt_logprobs=piece)
    yield msgspec.structs.replace(event, prompt_logprobs=logprobs[last_start:])


class Endpoints:
    """Two addresses to bind, one for each direction, and the folder behind them."""

    def __init__(self) -> None:
        self._folder = None if sys.platform == "win32" else tempfile.TemporaryDirectory(prefix="helix-")
        self.commands = self._address("commands")
        self.replies = self._address("replies")

    def _address(self, name: str) -> str:
        return "tcp://127.0.0.1:*" if self._folder is None else f"ipc://{Path(self._folder.name) / name}"

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            self._folder.cleanup()
