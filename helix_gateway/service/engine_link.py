"""The gateway's end of the connection to an engine's process: commands out, replies in, and when it counts as gone.

Replies are acted on where the event loop reads them: no task and no thread is woken in between.  Knows nothing about
what commands and replies mean, but for those that a load ends with.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import Any, cast

import psutil
import structlog

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.service.launch import EngineProcess
from helix_gateway.service.messages import Command, LoadFailed, Ready, Reply
from helix_gateway.service.wire import Frames, command_encoder, framed, reply_decoder

log = structlog.get_logger(__name__)

LOADING_TOLD_EVERY_S = 30.0
"""How often the log says that the model is still being loaded."""
_READ_BYTES = 64 * 1024
"""Read in one turn of the loop: logprobs of so many bytes take it about a millisecond."""
_LAST_WORDS_S = 1.0
"""How long what an ended engine has said may take to come, and an engine that has hung up to end."""
_SIGKILL = 9
_KILLED = (
    " The system does that where memory has run out, most likely: hold the weights in fewer bits (--quantization on a CPU, "
    "--dtype elsewhere), use a smaller model, lower --kv-cache-memory, or end other programs."
)
_LOOKS = 20
"""In how many turns an engine's silence is waited out: a gateway that stood still all the while has waited for one."""


class EngineGone(Exception):
    """The engine's process ended or hangs; the message says which."""


class EngineLink(asyncio.BufferedProtocol):
    """One engine process and the connection to it; made by `connected`."""

    def __init__(self, process: EngineProcess) -> None:
        self.process = process
        loop = asyncio.get_running_loop()
        self._ended = asyncio.ensure_future(process.wait())
        self._closed: asyncio.Future[None] = loop.create_future()
        """Done once nothing more will come."""
        self._first: asyncio.Future[Reply] = loop.create_future()
        self._unheard: list[Reply] = []
        """Those after the first that came while nobody listened."""
        self._take = self._unheard.append
        self._failure: Exception | None = None
        """Why no sense could be made of a reply."""
        self._heard = False
        """Whether something has come since that was last looked for."""
        self._buffer = bytearray(_READ_BYTES)
        self._frames = Frames()

    # ---- what the event loop calls ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> bytearray:
        """See `asyncio.BufferedProtocol`."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        self._heard = True
        if nbytes == _READ_BYTES:  # there is more: let those read first who wait for this
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._read_on)
        try:
            for message in self._frames.take(memoryview(self._buffer)[:nbytes]):
                self._hear(reply_decoder.decode(message))
        except Exception as error:  # noqa: BLE001 - told to whoever listens
            self._failure = error
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self._closed.set_result(None)

    def _read_on(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _hear(self, reply: Reply) -> None:
        if self._first.done():
            self._take(reply)
        else:
            self._first.set_result(reply)

    # ---- what the service calls ---------------------------------------------------------------------------------

    def send(self, command: Command) -> bool:
        """Pass a command on, without waiting; False if that is not possible."""
        if self._transport.is_closing():
            return False
        self._transport.write(framed(command_encoder.encode(command)))
        return True

    async def first_reply(self) -> Ready:
        """Wait for the model to be loaded.  Raises ModelLoadError if it cannot be."""
        waited_s = 0.0
        # However long it takes: how long a load may take, nobody knows.  But whoever looks at the log shall see.
        while not await self._done(self._first, LOADING_TOLD_EVERY_S):
            if self._failure is not None:
                raise ModelLoadError(f"The engine says what makes no sense: {self._failure}.") from self._failure
            if self._is_gone():
                why = await self._why_gone()
                if self._first.done():
                    break
                raise ModelLoadError(f"The engine ended while loading the model: {why}.{self._advice()}")
            waited_s += LOADING_TOLD_EVERY_S
            log.info("engine_loading", waited_s=waited_s, **_condition(self.process.pid))
        reply = self._first.result()
        if isinstance(reply, LoadFailed):
            raise ModelLoadError(reply.message)
        assert isinstance(reply, Ready), reply
        return reply

    async def listen(self, take: Callable[[Reply], None], silence_s: float) -> None:
        """Give every reply to ``take``, which the event loop calls as they come.

        Raises:
            EngineGone: it ended, or has said nothing for ``silence_s``.
            Exception: a reply made no sense, or ``take`` raised it.
        """
        for reply in self._unheard:
            take(reply)
        self._take = take
        looks_in_vain = 0
        while not self._is_gone():
            if looks_in_vain == _LOOKS:
                raise EngineGone(f"it has said nothing for {silence_s:.0f} s")
            looks_in_vain = 0 if await self._speaks(silence_s / _LOOKS) else looks_in_vain + 1
        if self._failure is not None:
            raise self._failure
        raise EngineGone(await self._why_gone())

    async def close(self) -> None:
        """End the process and close the connection: even if whoever waits for the end of both is cancelled."""
        self.process.kill()
        self._transport.abort()
        awaited: set[asyncio.Future[Any]] = {self._closed, self._ended}
        try:
            await asyncio.wait(awaited)
        finally:
            self.process.close()

    def _is_gone(self) -> bool:
        return self._closed.done() or self._ended.done()

    async def _done(self, future: asyncio.Future[Any], timeout_s: float) -> bool:
        """Whether a future is done before the engine is gone and the time is over."""
        waited: set[asyncio.Future[Any]] = {future, self._closed, self._ended}
        await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return future.done()

    async def _speaks(self, wait_s: float) -> bool:
        """Whether anything comes in that time; it is waited out, unless the engine is gone first."""
        self._heard = False
        await self._done(self._closed, wait_s)
        # Where this process was stopped meanwhile, the time is over before what has come is read.
        await asyncio.sleep(0)
        return self._heard

    def _advice(self) -> str:
        """What to do about an end that nobody of ours has brought about."""
        return _KILLED if self._ended.done() and self._ended.result() == -_SIGKILL else ""

    async def _why_gone(self) -> str:
        """How it ended, once all that it said has come."""
        awaited: set[asyncio.Future[Any]] = {self._closed, self._ended}
        await asyncio.wait(awaited, timeout=_LAST_WORDS_S)
        return _how_it_ended(self._ended.result()) if self._ended.done() else "it has closed its connection"


async def connected(process: EngineProcess) -> EngineLink:
    """A link to a process that has just been started."""
    loop = asyncio.get_running_loop()
    link = EngineLink(process)
    if sys.platform == "win32":
        await loop.create_connection(lambda: link, sock=process.connection)
    else:
        await loop.create_unix_connection(lambda: link, sock=process.connection)
    return link


def _condition(pid: int) -> dict[str, object]:
    """What the system says of a process that is waited for: one that is stopped, or uses no processor, hangs."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return {"process": process.status(), "cpu_s": round(times.user + times.system, 1)}
    except psutil.Error:
        return {}


def _how_it_ended(code: int) -> str:
    return f"signal {-code} ended it" if code < 0 else f"exit code {code}"
