"""How long parts of getting and loading a model are shown to whoever waits: bytes done out of bytes wanted.

Knows nothing about what the bytes are.  A bar is drawn on stderr where that is a terminal, and nowhere else.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

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
    """A `Progress` that draws a bar on stderr, where stderr is a terminal."""
    if not sys.stderr.isatty():
        with silent(label, total_bytes) as report:
            yield report
        return
    with _rich_bar(label, total_bytes) as report:
        yield report


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
