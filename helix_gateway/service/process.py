"""The engine in its own process, kept alive: started, listened to, missed when it dies or hangs, started again.

Python's lock is never shared between the gateway's loop and the engine's.  When the engine dies, requests in flight
end with an error, and later ones are refused until a new engine is ready; the gateway stays up.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

import msgspec
import psutil
import structlog
import zmq
import zmq.asyncio

from helix_gateway.core.errors import EngineUnavailableError, ModelLoadError
from helix_gateway.service.backlog import Backlog
from helix_gateway.service.client import EngineClient
from helix_gateway.service.engine_process import Assignment
from helix_gateway.service.launch import EngineProcess
from helix_gateway.service.messages import Command, LoadFailed, Ready, Reply, Submit
from helix_gateway.service.observer import EngineObserver
from helix_gateway.service.requests_in_flight import Sink
from helix_gateway.service.settings import EngineSettings
from helix_gateway.service.wire import Endpoints, command_encoder, reply_decoder
from helix_gateway.text.tokenizer import Tokenizer

log = structlog.get_logger(__name__)

HEARTBEAT_TIMEOUT_S = 60.0
"""A ready engine that has said nothing for so long hangs; the longest step must be shorter."""
LOADING_TOLD_EVERY_S = 30.0
"""How often the log says that the model is still being loaded."""
_RESTART_PAUSE_S = (0.0, 1.0, 5.0, 15.0)
"""Before the first, second, … start in a row that comes to nothing; the last goes on."""


class ProcessService(EngineClient):
    """A model served by a process of its own.

    Args:
        settings: the engine's.
        tokenizer: the model's, for this side.
        observer: keeps the figures; None where nobody will ask for them.
        heartbeat_timeout_s: after how long a silence an engine is ended and replaced.
        launched: the first engine's process, where it was started before this service was made; None: `start` does.
    """

    def __init__(
        self,
        settings: EngineSettings,
        tokenizer: Tokenizer,
        observer: EngineObserver | None = None,
        *,
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
        launched: EngineProcess | None = None,
    ) -> None:
        super().__init__(settings, tokenizer, observer)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._launched = launched
        self._link: _EngineLink | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def engine_pid(self) -> int | None:
        """The engine's process, while there is one."""
        return None if self._link is None else self._link.process.pid

    async def start(self) -> None:
        """Start the engine and wait until it is ready.

        Raises:
            ModelLoadError: it cannot be loaded; in one line, why.
        """
        launched, self._launched = self._launched, None
        self._link, ready = await _started_engine(self._settings, launched)
        self._receive(ready)
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End the engine; requests in flight end with an error.  May be called twice."""
        self._state = "stopped"
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._launched is not None:  # it was never told what to do
            launched, self._launched = self._launched, None
            await _end(launched)
        self._in_flight.fail_all("The server was stopped before this answer was finished.")

    def _send(self, command: Command) -> None:
        sent = self._link is not None and self._link.send(command)
        if not sent and isinstance(command, Submit):
            raise EngineUnavailableError("The engine cannot be reached; try again in a moment.")

    def _sink(self, backlog: Backlog) -> Sink:
        return backlog.put

    async def _keep(self) -> None:
        """Listen to the engine, and replace it whenever it ends."""
        try:
            while True:
                await self._listen()
                self._state = "restarting"
                self._observer.engine_gone()
                self._in_flight.fail_all("The engine died while serving this request; it is being restarted.")
                await self._restart()
        finally:
            self._in_flight.fail_all("The server was stopped before this answer was finished.")
            if self._link is not None:
                await self._link.close()
                self._link = None

    async def _listen(self) -> None:
        """Pass replies on until the engine ends or hangs."""
        link = self._link
        if link is None:
            return
        try:
            await link.listen(self._receive, self._heartbeat_timeout_s)
        except Exception as gone:  # noqa: BLE001 - an engine whose replies make no sense is as good as gone
            log.error("engine_gone", reason=str(gone), kind=type(gone).__name__, requests=len(self._in_flight))
        self._link = None
        await link.close()

    async def _restart(self) -> None:
        attempt = 0
        while self._link is None:
            await asyncio.sleep(_RESTART_PAUSE_S[min(attempt, len(_RESTART_PAUSE_S) - 1)])
            attempt += 1
            try:
                self._link, ready = await _started_engine(self._settings)
            except Exception as error:  # noqa: BLE001 - no memory, no disk, no model: the next try may find some
                log.error("engine_restart_failed", attempt=attempt, reason=str(error), kind=type(error).__name__)
            else:
                self._receive(ready)
                log.info("engine_restarted", attempt=attempt)


class EngineGone(Exception):
    """The engine's process ended or hangs; the message says which."""


class _EngineLink:
    """One engine process and the sockets to it."""

    def __init__(
        self, process: EngineProcess, commands: "zmq.Socket[bytes]", replies: zmq.asyncio.Socket, endpoints: Endpoints
    ) -> None:
        self.process = process
        self._commands = commands
        self._replies = replies
        self._endpoints = endpoints
        self._ended = asyncio.ensure_future(process.wait())
        self._heard_s = 0.0
        """When the last reply came, on `time.monotonic`."""
        self._arrival: asyncio.Future[bytes] | None = None
        """What `_pass_on` waits for, or has got last."""

    def send(self, command: Command) -> bool:
        """Pass a command on, without waiting; False if that is not possible."""
        try:
            self._commands.send(command_encoder.encode(command), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    async def first_reply(self) -> Ready:
        """Wait for the model to be loaded.  Raises ModelLoadError if it cannot be."""
        waited_s = 0.0
        try:
            # However long it takes: how long a load may take, nobody knows.  But whoever looks at the log shall see.
            while (reply := await self._next(LOADING_TOLD_EVERY_S)) is None:
                waited_s += LOADING_TOLD_EVERY_S
                log.info("engine_loading", waited_s=waited_s, **_condition(self.process.pid))
        except EngineGone as gone:
            raise ModelLoadError(f"The engine ended while loading the model: {gone}.") from None
        if isinstance(reply, LoadFailed):
            raise ModelLoadError(reply.message)
        assert isinstance(reply, Ready), reply
        return reply

    async def listen(self, take: Callable[[Reply], None], silence_s: float) -> None:
        """Give every reply to ``take``.

        A task of its own does so and nothing else: what is looked after beside it (an end, a silence) then costs no
        turn of the loop between a reply's arrival and its reader.

        Raises:
            EngineGone: it ended, or has said nothing for ``silence_s``.
        """
        self._heard_s = time.monotonic()
        passing = asyncio.ensure_future(self._pass_on(take))
        try:
            while True:
                left_s = max(0.0, self._heard_s + silence_s - time.monotonic())
                await asyncio.wait({passing, self._ended}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if passing.done():
                    passing.result()
                if self._has_replies():  # whatever has come is passed on first
                    await asyncio.sleep(0)
                elif self._ended.done():
                    raise EngineGone(_how_it_ended(self._ended.result()))
                elif time.monotonic() - self._heard_s >= silence_s:
                    raise EngineGone(f"it has said nothing for {silence_s:.0f} s")
        finally:
            passing.cancel()
            await asyncio.gather(passing, return_exceptions=True)

    def _has_replies(self) -> bool:
        """Whether a reply has come that `_pass_on` may not have seen yet."""
        if self._arrival is not None and self._arrival.done():
            return True
        # Not `poll`: it takes the signal that a message has come from whoever waits for one.  This passes it on.
        return bool(int(self._replies.get(zmq.EVENTS)) & zmq.POLLIN)

    async def _pass_on(self, take: Callable[[Reply], None]) -> None:
        while True:
            self._arrival = asyncio.ensure_future(self._replies.recv())
            take(reply_decoder.decode(await self._arrival))
            self._heard_s = time.monotonic()
            # A reply that is there already is had without waiting: let those read who wait for it.
            await asyncio.sleep(0)

    async def _next(self, timeout_s: float) -> Reply | None:
        """The next reply; None where none comes in time.  Raises EngineGone where none will ever come."""
        arrival = asyncio.ensure_future(self._replies.recv())
        try:
            if not arrival.done():
                await asyncio.wait({arrival, self._ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if arrival.done():
                return reply_decoder.decode(arrival.result())
            if self._ended.done():
                raise EngineGone(_how_it_ended(self._ended.result()))
            return None
        finally:
            arrival.cancel()

    async def close(self) -> None:
        """End the process and remove the sockets."""
        if self.process.returncode is None:
            self.process.kill()
        await self._ended
        self.process.close()
        self._commands.close(linger=0)
        self._replies.close(linger=0)
        self._endpoints.close()


async def _end(process: EngineProcess) -> None:
    process.kill()
    await process.wait()
    process.close()


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


async def _started_engine(
    settings: EngineSettings, launched: EngineProcess | None = None
) -> "tuple[_EngineLink, Ready]":
    """A new engine that has loaded its model."""
    link = await _start_engine(settings, launched)
    try:
        return link, await link.first_reply()
    except BaseException:
        await link.close()
        raise


async def _start_engine(settings: EngineSettings, launched: EngineProcess | None = None) -> _EngineLink:
    process = launched or EngineProcess()
    with contextlib.ExitStack() as opened:  # no memory, no disk: it is tried again, and again
        opened.callback(process.close)
        opened.callback(process.kill)
        endpoints = Endpoints()
        opened.callback(endpoints.close)
        commands: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        opened.callback(commands.close, linger=0)
        replies: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        opened.callback(replies.close, linger=0)
        # Nothing may be lost to a full queue; an engine that does not read is replaced, and its requests with it.
        commands.setsockopt(zmq.SNDHWM, 0)
        replies.setsockopt(zmq.RCVHWM, 0)
        commands.bind(endpoints.commands)
        replies.bind(endpoints.replies)
        opened.pop_all()
    assignment = Assignment(settings, _bound_to(commands), _bound_to(replies))
    process.assign(msgspec.json.encode(assignment))
    return _EngineLink(process, commands, replies, endpoints)


def _bound_to(socket: "zmq.Socket[bytes] | zmq.asyncio.Socket") -> str:
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
