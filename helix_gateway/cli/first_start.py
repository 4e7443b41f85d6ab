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
_TOLD_EVERY_S = 5.0
_WHY = "Compiling kernels for this processor; the next start finds them"
_WHY_ON_TERMINAL = "Compiling kernels for this processor, once"
"""Short enough for 80 columns with what follows it."""

Said = Callable[[], Awaitable[str]]
"""Waits until it is time to look again; how far it is then."""


@asynccontextmanager
async def telling_of_compilation() -> AsyncIterator[None]:
    """Watch for new kernels while this is open: a moving line on a terminal, otherwise one every few seconds."""
    task = asyncio.create_task(_watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _watch() -> None:
    from helix_gateway.runtime.cpu.compiled import USUAL_FUNCTIONS, num_compiled

    started_s, before = monotonic(), await asyncio.to_thread(num_compiled)
    there = before
    while there == before:
        await asyncio.sleep(LOOK_EVERY_S)
        there = await asyncio.to_thread(num_compiled)
    on_terminal = sys.stderr.isatty()

    async def how_far() -> str:
        await asyncio.sleep(LOOK_EVERY_S if on_terminal else _TOLD_EVERY_S)
        new = await asyncio.to_thread(num_compiled) - before
        # Beside what lies there already nobody knows how many a model needs, and the first may need more than the usual.
        total = f" of about {USUAL_FUNCTIONS}" if before == 0 and new < USUAL_FUNCTIONS else ""
        return f"{new}{total}, {monotonic() - started_s:.0f} s"

    await (_show if on_terminal else _tell)(how_far)


async def _show(how_far: Said) -> None:
    from rich.console import Console

    with Console(stderr=True).status(_WHY_ON_TERMINAL) as status:
        while True:
            status.update(f"{_WHY_ON_TERMINAL}: {await how_far()}")


async def _tell(how_far: Said) -> None:
    typer.echo(f"{_WHY}.", err=True)
    while True:
        typer.echo(f"Compiling kernels: {await how_far()}", err=True)
