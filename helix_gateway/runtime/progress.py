"""How long parts of getting and loading a model are shown to whoever waits: bytes done out of bytes wanted.

Knows nothing about what the bytes are.  A bar is drawn on stderr where that is a terminal; elsewhere
what takes long is told in lines.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Event, Timer
from time import monotonic
from typing import TypeAlias

QUIET_S = 1.0
"""What takes less is not worth a line."""

Report: TypeAlias = Callable[[int], None]
"""Told how many bytes are done so far."""

Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Report]]
"""Given what is being done and how many bytes it takes, opens a display and yields what to tell it."""


@contextmanager
def silent(_label: str, _total_bytes: int) -> Iterator[Report]:
    """A `Progress` that shows nothing."""
    yield lambda _done_bytes: None


@contextmanager
def terminal_bar(label: str, total_bytes: int) -> Iterator[Report]:
    """A `Progress` on stderr: a bar where that is a terminal, otherwise lines."""
    with (_rich_bar if sys.stderr.isatty() else lines)(label, total_bytes) as report:
        yield report


@contextmanager
def lines(label: str, total_bytes: int) -> Iterator[Report]:
    """A `Progress` of a line for each tenth, once it has taken a second, and one at the end."""
    told = [0]
    with told_if_long(label) as said:

        def report(done_bytes: int) -> None:
            tenths = min(10, 10 * done_bytes // max(1, total_bytes))
            if tenths > told[0] and said.is_set():
                told[0] = tenths
                _say(f"{label}: {tenths * 10} % of {total_bytes / 1e6:.0f} MB")

        yield report


@contextmanager
def told_if_long(label: str) -> Iterator[Event]:
    """Say on stderr what is being done once it has taken a second, and when it is done; yields whether it was said."""
    started_s, said = monotonic(), Event()

    def say() -> None:
        _say(f"{label} …")
        said.set()

    timer = Timer(QUIET_S, say)
    timer.daemon = True
    timer.start()
    try:
        yield said
    finally:
        timer.cancel()
    # Not where it failed: why is said by whoever asked.
    if said.is_set():
        _say(f"{label}: done in {monotonic() - started_s:.0f} s")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@contextmanager
def _rich_bar(label: str, total_bytes: int) -> Iterator[Report]:
    from rich import progress  # kept out of the start of every command: 40 ms
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda done_bytes: bar.update(task, completed=done_bytes)
        bar.update(task, completed=total_bytes)
