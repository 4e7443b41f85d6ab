"""Figures of a load as a table for people, as JSON for the record, and as a picture.

Knows nothing about how they came about.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helix_gateway.cli.load.summary import LevelSummary, Spread
from helix_gateway.core.errors import HelixError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

_LATE_SHARE = 0.1


def table(title: str, summaries: Sequence[LevelSummary]) -> "Table":
    """A table for a rich console, a column a level."""
    from rich.table import Table

    drawn = Table(title=title)
    drawn.add_column("load")
    for summary in summaries:
        drawn.add_column(summary.load, justify="right")
    for label, cell in _ROWS.items():
        drawn.add_row(label, *(cell(summary) for summary in summaries))
    return drawn


def _times(spread: Spread | None, names: Sequence[str], scale: float, digits: int) -> str:
    if spread is None:
        return "–"
    return " / ".join(f"{getattr(spread, name) * scale:.{digits}f}" for name in names)


_ROWS: dict[str, Callable[[LevelSummary], str]] = {
    "output tokens/s": lambda level: f"{level.output_tokens_per_s:.1f}",
    "requests/s": lambda level: f"{level.requests_per_s:.2f}",
    "first token ms, p50 / p90 / p99": lambda level: _times(level.ttft_s, ("p50", "p90", "p99"), 1e3, 0),
    "between tokens ms, p50 / p99": lambda level: _times(level.gap_s, ("p50", "p99"), 1e3, 1),
    "whole answer s, p50 / p99": lambda level: _times(level.e2e_s, ("p50", "p99"), 1.0, 2),
    "tokens in (cached)": lambda level: f"{level.prompt_tokens} ({level.cached_tokens})",
    "tokens out": lambda level: str(level.output_tokens),
    "answers": lambda level: str(level.finished),
    "cut off": lambda level: str(level.cancelled),
    "errors": lambda level: str(level.failed),
}


def remarks(summaries: Sequence[LevelSummary]) -> list[str]:
    """What a reader of the table should know besides: errors, and what makes figures doubtful."""
    found = [f"{summary.load}: {count} × {error}" for summary in summaries for error, count in summary.errors.items()]
    for summary in summaries:
        if not summary.tokens_counted_by_server:
            found.append(f"{summary.load}: the server tells no usage, so tokens are pieces of the stream.")
        late, first = summary.lag_s, summary.ttft_s
        if late and first and late.p99 > _LATE_SHARE * first.p99:
            found.append(
                f"{summary.load}: this machine sent requests up to {late.max * 1e3:.0f} ms late (client's lag)."
            )
    return found


def write_json(path: Path, summaries: Sequence[LevelSummary], **context: Any) -> None:
    """Write the figures, with whatever tells what was measured.

    Raises:
        HelixError: the file cannot be written.
    """
    record = {
        "benchmark": "helix bench",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **context,
        "levels": [asdict(summary) for summary in summaries],
    }
    try:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise HelixError(f"Cannot write {path}: {error.strerror}.") from error


def check_can_draw() -> None:
    """Look for matplotlib, which only the extra ``bench`` brings.

    Raises:
        HelixError: it is not there.
    """
    if find_spec("matplotlib") is None:
        raise HelixError("A picture needs matplotlib: pip install 'helix-gateway[bench]', or leave --plot out.")


def write_picture(path: Path, title: str, summaries: Sequence[LevelSummary]) -> None:
    """Draw throughput and latencies over the levels.

    Raises:
        HelixError: matplotlib is missing (the extra ``bench``), or the file cannot be written.
    """
    check_can_draw()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2))
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    _draw_throughput(left, summaries)
    _draw_latencies(right, summaries)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise HelixError(f"Cannot write {path}: {error.strerror}.") from error


def _draw_throughput(axes: "Axes", summaries: Sequence[LevelSummary]) -> None:
    bars = axes.bar([summary.load for summary in summaries], [summary.output_tokens_per_s for summary in summaries])
    axes.bar_label(bars, fmt="%.0f")
    axes.set_ylabel("output tokens/s, all streams together")


def _draw_latencies(axes: "Axes", summaries: Sequence[LevelSummary]) -> None:
    loads = [summary.load for summary in summaries]
    for label, attribute in (("first token", "ttft_s"), ("between tokens", "gap_s")):
        for name, style in (("p50", "-"), ("p99", ":")):
            spreads = [getattr(summary, attribute) for summary in summaries]
            values = [float("nan") if spread is None else getattr(spread, name) * 1e3 for spread in spreads]
            color = "tab:blue" if attribute == "ttft_s" else "tab:orange"
            axes.plot(loads, values, style, marker="o", color=color, label=f"{label}, {name}")
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)  # lines are anywhere
