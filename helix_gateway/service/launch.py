"""Starts an engine's process, and waits for its end, from the earliest moment on: no event loop is needed for that.

What takes longest in a new process, importing what models are made of, it does before it is told what to load.
Beside it, at a first start, another process compiles what any engine needs.  Imports nothing heavy itself.  Knows
nothing about what an engine is told or answers.

The process inherits one of a pair of sockets (where there are none of Unix', Python makes a pair of loopback's) and is
told which as its last argument.  It ends when its standard input does.
"""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress

from helix_gateway.runtime.cpu.compiled import is_first_start
from helix_gateway.runtime.cpu.threads import engine_environment, usable_cores

ENGINE_COMMAND = (sys.executable, "-m", "helix_gateway.service.engine_process_main")
"""What is started; it is told what to do on its standard input."""
COMPILING_COMMAND = (sys.executable, "-m", "helix_gateway.service.compiling_ahead_main")
"""What compiles beside it; it ends with its standard input."""

_END_S = 10.0
"""How long a killed engine is waited for."""
_CORES_TO_COMPILE = 2


class EngineProcess:
    """A process that waits for its assignment on its standard input, and ends with it.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self) -> None:
        self.connection, theirs = _pair()
        """To the process; whoever takes it closes it too."""
        try:
            with theirs:
                self._process = _started(theirs)
        except BaseException:
            self.connection.close()
            raise
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `subprocess.Popen` has it; None while the process lives."""
        return self._process.poll()

    def assign(self, line: bytes) -> None:
        """Say what to do; whether anybody still reads it shows in the process's end."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """End it at once; nothing happens where it has ended."""
        self._process.kill()

    async def wait(self) -> int:
        """Wait for its end; the return code."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[int] = loop.create_future()

        def wait() -> None:
            code = self._process.wait()
            with suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(lambda: None if ended.done() else ended.set_result(code))

        # Not one of the loop's own threads: those are waited for when the loop ends.
        threading.Thread(target=wait, name="engine-watch", daemon=True).start()
        return await ended

    def close(self) -> None:
        """Let go of both pipe and connection; the process ends."""
        self.connection.close()
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def end(self) -> None:
        """End it at once, and wait until it is gone and writes nowhere any more; nothing happens where it has ended.

        One that the kernel holds (a device that does not answer) is not waited for beyond `_END_S`.
        """
        self.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that send what they are given at once."""
    pair = socket.socketpair()
    for end in pair:
        if end.family in (socket.AF_INET, socket.AF_INET6):
            # Else TCP would keep a short message back until the one before it is acknowledged.
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return pair


def _started(theirs: socket.socket) -> "subprocess.Popen[bytes]":
    command = (*ENGINE_COMMAND, str(theirs.fileno()))
    environment = {**os.environ, **engine_environment()}
    if sys.platform == "win32":
        theirs.set_inheritable(True)
        only = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [theirs.fileno()]})
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, env=environment, startupinfo=only)
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=sys.stderr, env=environment, pass_fds=(theirs.fileno(),)
    )


class CompilingAhead:
    """A process that compiles what the engine will want later, where little is compiled and a core is to spare."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if not is_first_start() or usable_cores() < _CORES_TO_COMPILE:
            return
        with suppress(OSError):  # the engine compiles it all itself, then
            self._process = start_compiling()

    @property
    def pid(self) -> int | None:
        """The process; None where there is none."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End it; what it has compiled stays.  May be called twice."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def start_compiling(*what: str) -> "subprocess.Popen[bytes]":
    """Start a process that compiles what `compiling_ahead_main` knows by these words.

    Raises:
        OSError: it cannot be started.
    """
    # Where the engine's threads are bound to cores, these must not be: the first of both would share one.
    environment = {**os.environ, **engine_environment(), "OMP_PROC_BIND": "false"}
    command = (*COMPILING_COMMAND, *what)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
