"""What a first start says while it compiles: nothing where everything lies compiled already.

Knows nothing about what is compiled, nor by whom: it counts what is new in the folder where that is kept.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic

import typer

LOOK_EVERY_S = 1.0
_TOLD_EVERY_S = 15.0
_WHY = "Compiling kernels for this processor; the next start finds them"


@asynccontextmanager
async def telling_of_compilation() -> AsyncIterator[None]:
    """Watch for new kernels while this is open: a moving line on a terminal, otherwise one now and then."""
    task = asyncio.create_task(_watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _watch() -> None:
    from helix_gateway.runtime.cpu.compiled import num_compiled

    before = await asyncio.to_thread(num_compiled)

    async def made() -> int:
        await asyncio.sleep(LOOK_EVERY_S)
        return await asyncio.to_thread(num_compiled) - before

    while not await made():
        pass
    await (_show if sys.stderr.isatty() else _tell)(made)


async def _show(made: Callable[[], Awaitable[int]]) -> None:
    from rich.console import Console

    with Console(stderr=True).status(_WHY) as status:
        while True:
            status.update(f"{_WHY} ({await made()} so far)")


async def _tell(made: Callable[[], Awaitable[int]]) -> None:
    started_s = monotonic()
    typer.echo(f"{_WHY}.", err=True)
    while True:
        await asyncio.sleep(_TOLD_EVERY_S)
        typer.echo(f"Compiling: {await made()} kernels after {monotonic() - started_s:.0f} s", err=True)
