"""What every benchmark does with its figures: a table for people, JSON and a PNG plot for the record.

Knows nothing about what is measured.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).resolve().parent / "results"

T = TypeVar("T")


def machine() -> dict[str, Any]:
    """What was measured on."""
    import os

    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "avx512": "avx512f" in _flags(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> str:
    return _cpuinfo("flags")


def revision() -> str:
    """The commit that was measured."""
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal, moved on by what it yields.

    Painted only when it is moved, so that nothing runs beside what is measured.
    """
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), auto_refresh=False, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=total)

        def advance(done: int) -> None:
            bar.advance(task, done)
            bar.refresh()

        yield advance


def tracked(items: Iterable[T], label: str) -> Iterator[T]:
    """The same items, with a `progress` bar that moves on after each."""
    known = list(items)
    with progress(label, len(known)) as advance:
        for item in known:
            yield item
            advance(1)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=140).print(table)


def save(
    name: str,
    results: Mapping[str, Any],
    plot: Callable[[Any], None] | None = None,
    *,
    folder: Path = RESULTS,
    size: tuple[float, float] = (7, 4.5),
    facets: tuple[int, int] = (1, 1),
) -> None:
    """Write ``name.json``, and ``name.png``, ``size`` in inches, as ``plot`` draws it on matplotlib's axes.

    Of several ``facets`` (rows, columns) ``plot`` gets the array.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": machine(),
        **results,
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if plot is not None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=size)
        plot(figure.subplots(*facets))
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=110)
