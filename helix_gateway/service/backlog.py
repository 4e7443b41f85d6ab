"""What the engine has told of one request and nobody has read yet, held in bounded memory.

The engine never waits for a reader: a sequence that stood still would keep its blocks from others for as long as
somebody's connection is slow.  So what is not read piles up here.  Events of one choice are joined while they wait,
which makes tokens cheap (an answer without logprobs fits whole, in practice), and beyond a bound in bytes the request
ends: what waited is dropped, the engine is told to stop, and the reader, should it ever come back, is told why.
Knows nothing about text or sockets; belongs to one event loop.
"""

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from helix_gateway.core.errors import HelixError, SlowReaderError
from helix_gateway.core.event import TokenEvent, TokenLogprobs

MAX_REQUEST_BYTES = 4 * 2**20
"""What may wait of one request: some 2,500 tokens with 20 logprobs each, 80,000 without."""
MAX_TOTAL_BYTES = 256 * 2**20
"""What may wait of all of them, shared evenly."""
MAX_JOINED_TOKENS = 32
"""Tokens of one joined event: who reads it makes JSON of it in one go, a millisecond or two with 20 logprobs."""

# Bytes of CPython's objects, measured with sys.getsizeof: an event with its strings and lists; an int in a list; a
# token's logprobs with their lists; one alternative among them.
_EVENT_BYTES = 400
_TOKEN_BYTES = 36
_LOGPROBS_BYTES = 240
_ALTERNATIVE_BYTES = 72


def limit_bytes(num_requests: int) -> int:
    """How much may wait of each of so many requests."""
    return min(MAX_REQUEST_BYTES, MAX_TOTAL_BYTES // max(1, num_requests))


class Backlog:
    """A queue of one request's events, for one reader.

    Args:
        limit: how many bytes may wait, asked at each event.
        too_slow: called once when more do; the request is over then.
    """

    def __init__(self, limit: Callable[[], int], too_slow: Callable[[], None]) -> None:
        self._limit = limit
        self._too_slow = too_slow
        self._waiting: deque[list[TokenEvent]] = deque()
        self._newest: dict[int, list[TokenEvent]] = {}
        """By choice, its last slot in `_waiting`: an event, in a list of its own so that it can be replaced."""
        self._ahead: list[TokenLogprobs | None] = []
        """A long prompt's first logprobs, which come in parts."""
        self._failure: HelixError | None = None
        self._arrival: asyncio.Future[None] | None = None
        """What the reader waits for, while it does."""
        self.num_bytes = 0
        """About what the waiting events take."""

    def put(self, event: TokenEvent | HelixError) -> None:
        """Add what happened; an error is read after all that came before it."""
        if self._failure is not None:
            return
        if isinstance(event, HelixError):
            self._failure = event
        else:
            self._add(event)
            if self.num_bytes > self._limit():
                self._give_up()
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def get(self) -> TokenEvent:
        """The next event, waiting for one.  Raises HelixError when the request has failed."""
        while not self._waiting:
            if self._failure is not None:
                raise self._failure
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        slot = self._waiting.popleft()
        event = slot[0]
        if self._newest.get(event.index) is slot:
            del self._newest[event.index]
        self.num_bytes -= _size_bytes(event)
        return event

    def _add(self, event: TokenEvent) -> None:
        if event.prompt_logprobs is not None:
            self._ahead += event.prompt_logprobs
            if not event.token_ids and event.finish_reason is None:
                return
            event = msgspec.structs.replace(event, prompt_logprobs=self._ahead)
            self._ahead = []
        slot = self._newest.get(event.index)
        if slot is None or len(slot[0].token_ids) + len(event.token_ids) > MAX_JOINED_TOKENS:
            slot = self._newest[event.index] = [event]
            self._waiting.append(slot)
            self.num_bytes += _size_bytes(event)
            return
        joined = _joined(slot[0], event)
        self.num_bytes += _size_bytes(joined) - _size_bytes(slot[0])
        slot[0] = joined

    def _give_up(self) -> None:
        self._failure = SlowReaderError(self._limit())
        self._waiting.clear()
        self._newest.clear()
        self.num_bytes = 0
        self._too_slow()


def _joined(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    """Two successive events of one choice as one."""
    return msgspec.structs.replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        logprobs=_both(first.logprobs, second.logprobs),
        start=first.start or second.start,
        prompt_logprobs=second.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs,
    )


def _both(first: list[TokenLogprobs] | None, second: list[TokenLogprobs] | None) -> list[TokenLogprobs] | None:
    return first if second is None else second if first is None else first + second


def _size_bytes(event: TokenEvent) -> int:
    """About what an event takes, less its prompt's logprobs, which come once and are no longer than was asked for."""
    size = _EVENT_BYTES + _TOKEN_BYTES * len(event.token_ids)
    for token in event.logprobs or ():
        size += _LOGPROBS_BYTES + _ALTERNATIVE_BYTES * len(token.top_ids)
    return size
