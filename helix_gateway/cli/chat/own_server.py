"""A ``helix serve`` of one's own: started for a conversation, quiet, and gone with it.

Knows nothing about what is asked of it.
"""

import asyncio
import contextlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from typing import IO, Any

from helix_gateway.core.errors import HelixError
from helix_gateway.service.settings import DTypeName

_URL = re.compile(rb"https?://\S+")
_END_TIMEOUT_S = 15.0
_SHOWN_LINES = 3


class OwnServer:
    """``async with OwnServer(path, name) as server: ... server.url, server.api_key``

    Args:
        model_path: a local file or folder.
        name: what the model is called.
        dtype: what its weights are computed in; None: as settings say.

    Raises:
        HelixError: on entry, where the server does not come up; with what it said last.
    """

    def __init__(self, model_path: str, name: str, dtype: DTypeName | None = None) -> None:
        self.url = ""
        self.api_key = secrets.token_urlsafe(16)
        """Nobody else's, so that no other program on the machine uses this server."""
        self._arguments = [model_path, "--served-model-name", name, "--host", "127.0.0.1", "--port", "0"]
        if dtype is not None:
            self._arguments += ["--dtype", dtype]
        self._log: IO[bytes] | None = None
        self._process: Process | None = None

    async def __aenter__(self) -> "OwnServer":
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the server has ended
        try:
            self._process = await self._start()
            self.url = await self._first_url(self._process)
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def _start(self) -> Process:
        """Out of the terminal's group of processes: Ctrl-C there stops an answer, not the server."""
        apart: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "helix_gateway.cli.chat.served",
            *self._arguments,
            stdin=PIPE,
            stdout=PIPE,
            stderr=self._log,
            env={**os.environ, "HELIX_API_KEY": self.api_key},
            **apart,
        )

    async def _first_url(self, process: Process) -> str:
        assert process.stdout is not None
        async for line in process.stdout:
            if found := _URL.search(line):
                return found[0].decode()
        await process.wait()
        raise HelixError(f"The server did not start: {self._last_words()}")

    def _last_words(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        complaints = [line.removeprefix("helix: ") for line in lines if line.startswith("helix: ")]
        return " ".join(complaints or lines[-_SHOWN_LINES:] or ["it said nothing."])

    async def _end(self) -> None:
        """Close the pipe that it watches, and see that it goes."""
        process = self._process
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), _END_TIMEOUT_S)
            except asyncio.TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._log is not None:
            self._log.close()
