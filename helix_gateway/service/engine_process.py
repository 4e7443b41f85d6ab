"""The engine in a process of its own, started by `engine_process_main`.

Started by exec, never by fork.  The first line of its standard input says what to load and where to connect; the
rest of that pipe says nothing, but its end means that the parent is gone, and then so is this process.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec
import structlog
import zmq

from helix_gateway.core.errors import HelixError
from helix_gateway.service.messages import Command, LoadFailed, Ready, Reply
from helix_gateway.service.settings import EngineSettings
from helix_gateway.service.wire import command_decoder, encoded
from helix_gateway.telemetry.logging import configure_engine_logging

if TYPE_CHECKING:
    Socket = zmq.Socket[bytes]

log = structlog.get_logger(__name__)

_EXIT_ORPHANED = 3
_LINGER_MS = 1000


class Assignment(msgspec.Struct, frozen=True):
    """The first line of standard input, as JSON."""

    settings: EngineSettings
    commands: str
    """Where commands come from."""
    replies: str
    """Where replies go."""


class SocketInbox:
    """Commands from a socket (`service.loop.Inbox`); never closed, since the process ends with its parent."""

    def __init__(self, socket: "Socket") -> None:
        self._socket = socket

    def receive(self, timeout_s: float) -> list[Command]:
        """See `Inbox`."""
        commands: list[Command] = []
        timeout_ms = int(timeout_s * 1000)
        while self._socket.poll(timeout_ms):
            commands.append(command_decoder.decode(self._socket.recv()))
            timeout_ms = 0
        return commands


def main() -> None:
    """Read the assignment, load, serve until the parent goes away."""
    # Ctrl-C, and a service manager's SIGTERM, reach the whole group; when to stop is the gateway's decision, which comes as the end of the pipe.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    # What takes longest goes on while nobody has said yet what to load.
    imports = threading.Thread(target=_import_what_is_heavy, name="imports", daemon=True)
    imports.start()
    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(_EXIT_ORPHANED)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    # Two threads never import at once: what imports in a circle would be seen half made.
    imports.join()
    assignment = msgspec.json.decode(line, type=Assignment)
    configure_engine_logging(assignment.settings.log)
    context: zmq.Context[Socket] = zmq.Context.instance()
    commands, replies = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket in (commands, replies):
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
    commands.connect(assignment.commands)
    replies.connect(assignment.replies)
    if not _serve(assignment.settings, commands, replies):
        context.destroy(linger=_LINGER_MS)
        sys.exit(1)


def _import_what_is_heavy() -> None:
    # What goes wrong here goes wrong again where the parent can be told.
    with suppress(Exception):
        import_module("helix_gateway.service.host")


def _end_with_parent() -> None:
    # Past Python's buffer: its lock, held by a reader, would spoil an orderly exit.
    while os.read(0, 1):
        pass
    os._exit(_EXIT_ORPHANED)


def _serve(settings: EngineSettings, commands: "Socket", replies: "Socket") -> bool:
    """Load and serve; False if the model cannot be loaded."""

    def tell(reply: Reply) -> None:
        for message in encoded(reply):
            replies.send(message)

    # Imported here: what is heavy is loaded once the parent can already be told of trouble.
    try:
        from helix_gateway.service.host import EngineHost
        from helix_gateway.service.loop import run_loop

        host = EngineHost(settings)
    except HelixError as error:
        tell(LoadFailed(str(error)))
        return False
    except Exception as error:
        log.exception("load_failed")
        reason = (str(error).splitlines() or [""])[0]
        tell(LoadFailed(f"The model could not be loaded: {type(error).__name__}: {reason}"))
        return False
    tell(Ready(host.max_model_len, host.vocab_size))
    run_loop(host, SocketInbox(commands), tell, batch_window_s=settings.batch_window_ms / 1e3)
    return True
