"""Long bodies are taken apart by a process of their own, to which they pass in the pieces in which they arrived.

msgspec reads JSON in one call, which keeps Python's lock for 2 to 3 ms a megabyte, and with it the event loop; so does
putting megabytes of pieces together.  A process lives for one body; the next one is started then, for the next long
body comes from whoever sent the first.  Knows nothing about what fields mean.
"""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from helix_gateway.core.errors import EngineUnavailableError
from helix_gateway.gateway.envelope import Envelope, JsonError, Overlong, Wanted
from helix_gateway.gateway.envelope_process import Malformed, decode_answer

BYTES_PER_TOKEN = 64
"""More JSON than this for each token of the context is no prompt that fits: text has about 4."""
MIN_LIMIT_BYTES = 1024 * 1024
"""No prompt is called too long for its bytes below this."""

_COMMAND = (sys.executable, "-m", "helix_gateway.gateway.envelope_process")
_MOST_AT_ONCE = 4


def limit_bytes(context_tokens: int) -> int:
    """How long a prompt may be in JSON where the longest context is so many tokens."""
    return max(MIN_LIMIT_BYTES, context_tokens * BYTES_PER_TOKEN)


class LongBodies:
    """Starts the processes; belongs to one event loop."""

    def __init__(self) -> None:
        self._spare: Process | None = None
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
                self._spare = self._spare or await _start()
            except (OSError, msgspec.DecodeError) as error:
                raise EngineUnavailableError("Long requests cannot be read just now; try again in a moment.") from error
        if isinstance(answer, Malformed):
            raise JsonError(answer.path, answer.problem)
        return answer

    async def close(self) -> None:
        """End the process that waits, if there is one."""
        if self._spare is not None:
            await self._spare.communicate(b"")
            self._spare = None

    async def _process(self) -> Process:
        process, self._spare = self._spare, None
        return await _start() if process is None or process.returncode is not None else process


async def _start() -> Process:
    return await asyncio.create_subprocess_exec(*_COMMAND, stdin=PIPE, stdout=PIPE)


async def _ask(process: Process, pieces: Sequence[bytes], wanted: Wanted) -> Envelope | Overlong | Malformed:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(wanted) + b"\n")
        for piece in pieces:
            process.stdin.write(piece)
            await process.stdin.drain()
        process.stdin.close()
        answer: Envelope | Overlong | Malformed = decode_answer(await process.stdout.read())
        await process.wait()
        return answer
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
