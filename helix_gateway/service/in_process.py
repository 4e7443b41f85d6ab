"""The engine on a thread of this process: for the library, and for tests.

Python's lock is shared with whoever else runs here; `process.py` is what serves.
"""

import asyncio
import queue
import threading
from concurrent.futures import Future

from helix_gateway.core.errors import HelixError
from helix_gateway.core.event import TokenEvent
from helix_gateway.service.backlog import Backlog
from helix_gateway.service.client import EngineClient
from helix_gateway.service.host import EngineHost
from helix_gateway.service.loop import Closed, run_loop
from helix_gateway.service.messages import Command, Ready
from helix_gateway.service.observer import EngineObserver
from helix_gateway.service.requests_in_flight import Sink
from helix_gateway.service.settings import EngineSettings
from helix_gateway.text.tokenizer import Tokenizer


class ThreadInbox:
    """A queue of commands (`service.loop.Inbox`)."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def put(self, command: Command) -> None:
        """Add a command, from any thread."""
        self._commands.put(command)

    def close(self) -> None:
        """Let the reader end."""
        self._commands.put(None)

    def receive(self, timeout_s: float) -> list[Command]:
        """See `Inbox`."""
        commands = []
        try:
            while True:
                command = self._commands.get(timeout=timeout_s) if timeout_s else self._commands.get_nowait()
                if command is None:
                    raise Closed
                commands.append(command)
                timeout_s = 0.0
        except queue.Empty:
            return commands


class InProcessService(EngineClient):
    """A model served by a thread of this process; returns once it is loaded.

    Raises:
        ModelLoadError: in one line, what is wrong with the model or the device.
    """

    def __init__(
        self, settings: EngineSettings, tokenizer: Tokenizer | None = None, observer: EngineObserver | None = None
    ) -> None:
        super().__init__(settings, tokenizer or Tokenizer.load(settings.model_path), observer)
        self._inbox = ThreadInbox()
        self._loaded: Future[EngineHost] = Future()
        self._thread = threading.Thread(target=self._run, name="helix-engine", daemon=True)
        self._thread.start()
        self.host = self._loaded.result()

    def _run(self) -> None:
        # Loaded here too: OpenMP gives each thread that ever computes a team of its own, and with more teams than
        # cores it lets their threads fall asleep between two products.
        try:
            host = EngineHost(self._settings, self._tokenizer)
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the load
            self._loaded.set_exception(error)
            return
        self._receive(Ready(host.max_model_len, host.vocab_size))
        self._loaded.set_result(host)
        try:
            run_loop(host, self._inbox, self._receive, batch_window_s=self._settings.batch_window_ms / 1e3)
        finally:
            host.close()
            self._state = "stopped"
            self._observer.engine_gone()
            self._in_flight.fail_all("The engine has stopped.")

    def _send(self, command: Command) -> None:
        self._inbox.put(command)

    def _sink(self, backlog: Backlog) -> Sink:
        loop = asyncio.get_running_loop()

        def put(event: TokenEvent | HelixError) -> None:
            try:
                loop.call_soon_threadsafe(backlog.put, event)
            except RuntimeError:  # the loop that waited is closed: so is the request
                self._in_flight.remove(event.request_id if isinstance(event, TokenEvent) else "")

        return put

    def close(self) -> None:
        """Stop the thread; requests in flight end with an error.  May be called twice."""
        self._inbox.close()
        self._thread.join()
