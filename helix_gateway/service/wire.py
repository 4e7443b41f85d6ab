"""Commands and replies as bytes on a stream between two processes of one user: msgpack, its length before each message.

Knows nothing about who reads and writes them, nor how (`engine_link.py` in the gateway's process, `gateway_link.py` in the
engine's).
"""

from collections.abc import Iterator

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


LENGTH_BYTES = 4


def framed(message: bytes) -> bytes:
    """A message as it goes over the stream."""
    return len(message).to_bytes(LENGTH_BYTES, "little") + message


class Frames:
    """Takes a stream apart into messages, however it comes in pieces."""

    def __init__(self) -> None:
        self._held = bytearray()
        """What has come of messages that are not whole yet."""

    def take(self, data: bytes | memoryview) -> list[bytes]:
        """The messages that ``data`` completes."""
        self._held += data
        messages: list[bytes] = []
        start = 0
        while len(self._held) >= (begin := start + LENGTH_BYTES):
            end = begin + int.from_bytes(self._held[start:begin], "little")
            if len(self._held) < end:
                break
            messages.append(bytes(self._held[begin:end]))
            start = end
        del self._held[:start]
        return messages
