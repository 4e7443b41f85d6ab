"""Long bodies are taken apart by a process of their own, to which they pass in the pieces in which they arrived.

msgspec reads JSON in one call, which keeps Python's lock for 2 to 3 ms a megabyte, and with it the event loop; so does
copying megabytes about.  A process lives for one body; the next one is started then, for the next long body comes from
whoever sent the first.  Knows nothing about what fields mean.
"""

import asyncio
import sys
from asyncio import IncompleteReadError, StreamReader, StreamWriter
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import structlog

from helix_gateway.core.errors import EngineUnavailableError
from helix_gateway.gateway.envelope import Envelope, JsonError, Overlong, Wanted
from helix_gateway.gateway.envelope_process import LENGTH_BYTES, Contents, Malformed, decode_head

BYTES_PER_TOKEN = 64
"""More JSON than this for each token of the context is no prompt that fits: text has about 4."""
MIN_LIMIT_BYTES = 1024 * 1024
"""No prompt is called too long for its bytes below this."""

_COMMAND = (sys.executable, "-m", "helix_gateway.gateway.envelope_process")
_MOST_AT_ONCE = 4
_READ_AHEAD_BYTES = 1024 * 1024
"""Of an answer; with little, its reader is stopped and started for every 64 KB."""
_LONG_JOIN_BYTES = 1024 * 1024
"""Longer values are put together in a thread: beyond this `bytes.join` lets go of Python's lock (CPython's source)."""

_log = structlog.get_logger("helix.long_bodies")


def limit_bytes(context_tokens: int) -> int:
    """How long a prompt may be in JSON where the longest context is so many tokens."""
    return max(MIN_LIMIT_BYTES, context_tokens * BYTES_PER_TOKEN)


class LongBodies:
    """Starts the processes; belongs to one event loop."""

    def __init__(self) -> None:
        self._spare: Process | None = None
        self._starting: asyncio.Task[None] | None = None
        """Of the next spare one."""
        self._slots = asyncio.Semaphore(_MOST_AT_ONCE)

    async def read(self, pieces: Sequence[bytes], wanted: Wanted) -> Envelope | Overlong:
        """Take a body apart; as `envelope.read_envelope`.

        Raises:
            JsonError: it is no JSON, or no object.
            EngineUnavailableError: this machine has no room for another process.
        """
        async with self._slots:
            try:
                process = await self._process()
                answer = await _ask(process, pieces, wanted)
            except (OSError, IncompleteReadError, msgspec.DecodeError) as error:
                raise EngineUnavailableError("Long requests cannot be read just now; try again in a moment.") from error
        self._prepare()
        if isinstance(answer, Malformed):
            raise JsonError(answer.path, answer.problem)
        return answer

    async def close(self) -> None:
        """End the process that waits, if there is one."""
        if self._starting is not None:
            await asyncio.wait([self._starting])
        if self._spare is not None:
            await self._spare.communicate(b"")
            self._spare = None

    async def _process(self) -> Process:
        process, self._spare = self._spare, None
        return await _start() if process is None or process.returncode is not None else process

    def _prepare(self) -> None:
        """See that one process waits for the next body; whoever sent this one does not wait for that."""
        if self._spare is None and (self._starting is None or self._starting.done()):
            self._starting = asyncio.create_task(self._start_spare())

    async def _start_spare(self) -> None:
        try:
            self._spare = await _start()
        except OSError as error:
            # The next long body tries again, and is told if there is still no room.
            _log.warning("no process waits for the next long body", error=str(error))


async def _start() -> Process:
    return await asyncio.create_subprocess_exec(*_COMMAND, stdin=PIPE, stdout=PIPE, limit=_READ_AHEAD_BYTES)


async def _ask(process: Process, pieces: Sequence[bytes], wanted: Wanted) -> Envelope | Overlong | Malformed:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        await _send(process.stdin, pieces, wanted)
        answer = await _receive(process.stdout)
        await process.wait()
        return answer
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _send(stream: StreamWriter, pieces: Sequence[bytes], wanted: Wanted) -> None:
    stream.write(msgspec.json.encode(wanted) + b"\n")
    for piece in pieces:
        stream.write(piece)
        await stream.drain()
    stream.close()


async def _receive(stream: StreamReader) -> Envelope | Overlong | Malformed:
    size = int.from_bytes(await stream.readexactly(LENGTH_BYTES), "big")
    head: Contents | Overlong | Malformed = decode_head(await stream.readexactly(size))
    if not isinstance(head, Contents):
        return head
    return Envelope({name: await _value(stream, size) for name, size in head.sizes.items()}, head.others)


async def _value(stream: StreamReader, size: int) -> bytes:
    pieces: list[bytes] = []
    left = size
    while left:
        piece = await stream.read(left)
        if not piece:
            raise IncompleteReadError(b"", left)
        pieces.append(piece)
        left -= len(piece)
    if size > _LONG_JOIN_BYTES:
        return await asyncio.to_thread(b"".join, pieces)
    return b"".join(pieces)
