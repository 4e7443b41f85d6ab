"""Server-sent events: headers, back-pressure, pings, and how a stream ends.

A stream's head is sent with its first event, so that trouble before it is an ordinary JSON error; where the first
event lets wait, the head goes out with a ping.  `response.write` waits while the client's buffer is full, and with
it the generator behind; nothing is queued here.  Follows the WHATWG's HTML standard, section 9.2.  Knows nothing
about what events say.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from aiohttp import web

from helix_gateway.gateway.errors import ApiError
from helix_gateway.gateway.limits.time import TimeLimit, end, in_time

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
LAST_WORD_S = 5.0
"""How long a client may take to read how its stream ends, whatever is left of the request's time."""
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

_LINE_BREAKS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
"""Characters that are no line ends to SSE but are to the line splitters of some clients."""


def event(json: bytes) -> bytes:
    """One event around a JSON text."""
    return b"data: " + one_line(json) + b"\n\n"


def one_line(json: bytes) -> bytes:
    """The same JSON without the Unicode line breaks that careless clients split at."""
    if not json.isascii():
        for raw, escaped in _LINE_BREAKS:
            json = json.replace(raw, escaped)
    return json


class _Response(web.StreamResponse):
    """aiohttp sends a stream's head at once; here an event always follows, and one packet wakes a client once."""

    _send_headers_immediately = False


class EventStream:
    """One response that events are written to, kept alive by pings."""

    def __init__(self, request: web.Request, time_limit: TimeLimit, ping_interval_s: float) -> None:
        self._request = request
        self._time_limit = time_limit
        self._response = _Response(headers=HEADERS)
        self._interval_s = ping_interval_s
        self._loop = asyncio.get_running_loop()
        self._last_write_s = self._loop.time()
        self._num_writing = 0
        """Writes under way: of an event, of a ping, or of both where one waits for the client."""
        self._alarm = self._loop.call_later(ping_interval_s, self._break_silence)
        # A task only while a ping is written: one that waited beside each stream would end as a knot of objects that
        # refer to each other (the task, why it was cancelled, the frames of that), for the garbage collector to find.
        self._ping: asyncio.Task[None] | None = None
        self.client_left = False
        """Whether the client closed the connection before the end."""
        self.answered = False
        """Whether the last event is written: a client that closes from then on has what it came for."""

    async def run(
        self, events: AsyncGenerator[bytes, None], explain: Callable[[Exception], ApiError]
    ) -> web.StreamResponse:
        """Write all events; ``explain`` turns an exception after the first byte into the last event.

        Raises:
            Exception: whatever ``events`` raises before the first byte.
        """
        try:
            await self._relay(events, explain)
        except ConnectionResetError:
            self.client_left = True
        finally:
            await self._end_pings()
            await events.aclose()
        return self._response

    async def _relay(self, events: AsyncGenerator[bytes, None], explain: Callable[[Exception], ApiError]) -> None:
        try:
            last = await in_time(self._time_limit, self._write_all(events))
            left_s = self._time_limit.left_s
            within_s = None if left_s is None else max(left_s, LAST_WORD_S)
        except ConnectionResetError:
            raise
        except Exception as error:
            if not self._response.prepared:
                raise
            # The head is sent: all that is left is to say it in an event.
            last, within_s = event(explain(error).body()), LAST_WORD_S
        await self._write_last(last, within_s)
        self.answered = True

    async def _write_all(self, events: AsyncGenerator[bytes, None]) -> bytes:
        """Write all events but those at the end, which `DONE` closes: they go in one packet with the response's own end."""
        async for payload in events:
            if payload.endswith(DONE):
                if not self._response.prepared:
                    await self._prepare()
                return payload
            await self._write(payload)
        return b""

    async def _write_last(self, payload: bytes, within_s: float | None) -> None:
        """Write the end; a client that has stopped reading would keep it waiting for ever, where there is a limit."""
        await self._end_pings()  # one that came after the end would stand between this answer and the next
        try:
            await asyncio.wait_for(self._response.write_eof(payload), within_s)
        except asyncio.TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("The client does not read.") from None

    async def _write(self, payload: bytes) -> None:
        self._num_writing += 1
        try:
            if not self._response.prepared:
                await self._prepare()
            await self._response.write(payload)
        finally:
            self._num_writing -= 1
            self._last_write_s = self._loop.time()

    async def _prepare(self) -> None:
        self._time_limit.told_by_stream = True
        await self._response.prepare(self._request)

    def _break_silence(self) -> None:
        silence_s = self._loop.time() - self._last_write_s
        if silence_s >= self._interval_s and not self._num_writing:
            self._ping = self._loop.create_task(self._write_ping())
            silence_s = 0.0
        wait_s = max(self._interval_s - silence_s, self._interval_s / 10)
        self._alarm = self._loop.call_later(wait_s, self._break_silence)

    async def _write_ping(self) -> None:
        with suppress(ConnectionResetError):
            await self._write(PING)

    async def _end_pings(self) -> None:
        self._alarm.cancel()
        await end(self._ping)
