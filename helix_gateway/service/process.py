"""The engine in its own process, kept alive: started, listened to, missed when it dies or hangs, started again.

Python's lock is never shared between the gateway's loop and the engine's.  When the engine dies, requests in flight
end with an error, and later ones are refused until a new engine is ready; the gateway stays up.  Knows nothing about
how commands and replies travel, nor about HTTP.
"""

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec
import structlog

from helix_gateway.core.errors import EngineUnavailableError
from helix_gateway.core.event import TokenEvent
from helix_gateway.service.backlog import Backlog
from helix_gateway.service.client import EngineClient
from helix_gateway.service.engine_link import EngineLink, connected
from helix_gateway.service.launch import EngineProcess
from helix_gateway.service.messages import Command, Ready, Submit
from helix_gateway.service.observer import EngineObserver
from helix_gateway.service.requests_in_flight import Sink
from helix_gateway.service.settings import EngineSettings
from helix_gateway.text.tokenizer import Tokenizer

log = structlog.get_logger(__name__)

HEARTBEAT_TIMEOUT_S = 60.0
"""A ready engine that has said nothing for so long hangs; the longest step must be shorter."""
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
        self._link: EngineLink | None = None
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

    def _observe(self, events: Sequence[TokenEvent]) -> None:
        # Those who wait for the events have been woken by now, and come first.
        asyncio.get_running_loop().call_soon(super()._observe, events)

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


async def _end(process: EngineProcess) -> None:
    process.kill()
    process.close()
    await process.wait()


async def _started_engine(settings: EngineSettings, launched: EngineProcess | None = None) -> tuple[EngineLink, Ready]:
    """A new engine that has loaded its model."""
    link = await _start_engine(settings, launched)
    try:
        return link, await link.first_reply()
    except BaseException:
        await link.close()
        raise


async def _start_engine(settings: EngineSettings, launched: EngineProcess | None = None) -> EngineLink:
    process = launched or EngineProcess()
    try:  # no memory: it is tried again, and again
        link = await connected(process)
    except BaseException:
        process.kill()
        process.close()
        raise
    process.assign(msgspec.json.encode(settings))
    return link
