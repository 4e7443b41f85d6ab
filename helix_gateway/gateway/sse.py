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
"""How long a client may take to read why its stream ends."""
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
        self._clock = asyncio.get_running_loop().time
        self._last_write_s = self._clock()
        self._writing = False
        self._pinging: asyncio.Task[None] | None = None
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
        head = asyncio.ensure_future(_first(events))
        try:
            await asyncio.wait({head}, timeout=self._interval_s)
            if head.done():
                head.result()
            await self._relay(head, events, explain)
        except ConnectionResetError:
            self.client_left = True
        finally:
            await end(head, self._pinging)
            await events.aclose()
        return self._response

    async def _relay(
        self,
        head: asyncio.Future[bytes],
        events: AsyncGenerator[bytes, None],
        explain: Callable[[Exception], ApiError],
    ) -> None:
        self._time_limit.told_by_stream = True
        await self._response.prepare(self._request)
        self._pinging = asyncio.create_task(self._ping())
        if not head.done():
            await self._write(PING)
        try:
            await in_time(self._time_limit, self._write_all(head, events))
        except ConnectionResetError:
            raise
        except Exception as error:  # noqa: BLE001 - the head is sent: all that is left is to say it in an event
            await self._write_last(event(explain(error).body()))
        self.answered = True
        await self._response.write_eof()

    async def _write_all(self, head: asyncio.Future[bytes], events: AsyncGenerator[bytes, None]) -> None:
        await self._write(await head)
        async for payload in events:
            await self._write(payload)

    async def _write_last(self, payload: bytes) -> None:
        """Write what explains the end; a client that has stopped reading would keep it waiting for ever."""
        try:
            await asyncio.wait_for(self._write(payload), LAST_WORD_S)
        except asyncio.TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("The client does not read.") from None

    async def _write(self, payload: bytes) -> None:
        self._writing = True
        try:
            await self._response.write(payload)
        finally:
            self._writing = False
            self._last_write_s = self._clock()

    async def _ping(self) -> None:
        # RuntimeError: the answer came to its end while this was on its way.
        with suppress(ConnectionResetError, RuntimeError):
            while True:
                silence_s = self._clock() - self._last_write_s
                if silence_s >= self._interval_s and not self._writing:
                    await self._write(PING)
                    silence_s = 0.0
                await asyncio.sleep(max(self._interval_s - silence_s, self._interval_s / 10))


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    async for payload in events:
        return payload
    return b""
