"""What a step costs by the number of its rows: measured when the engine starts, refined by every step that is like it.

Kept at some numbers of rows and read between them linearly.  The measured shape is kept; a step that took longer or
shorter than expected moves the scale of all of it, and a little more the costs near its own number of rows, which fade
back to the shape.  Each is believed within bounds: a machine that is busy for a while makes everything dearer for that
while, and leaves nothing behind.  Knows nothing about drafts.
"""

import random
from collections.abc import Mapping, Sequence
from time import perf_counter

import numba
import numpy as np
import numpy.typing as npt

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.core.inner_functions import INNER
from helix_gateway.core.protocols import Logits, ModelRunner
from helix_gateway.core.step import StepBatch

Float64s = npt.NDArray[np.float64]

KNOTS = (
    *range(1, 33),
    *range(36, 64, 4),
    *(base * eighths // 8 for base in (64, 128, 256, 512, 1024, 2048) for eighths in (8, 10, 12, 14)),
    4096,
)
"""Numbers of rows; every one where rows are few, since kernels take them in tiles, and a row more may cost a tile."""
_RATE = 0.1
"""Share of what a step differed by that the scale takes over."""
_LOCAL_RATE = 0.2
"""The same for its own number of rows, beside the scale."""
_FADING = 0.01
"""Share of what is known of single numbers of rows that is forgotten with each step."""
_MOST_AT_ONCE = 0.3
"""Largest difference, as a logarithm, that one step is believed."""
_HELD_UP = 0.8
"""A step that differs by more was more likely held up than that it tells of costs: it is believed the less for it."""
_IN_PROPORTION = 0.98
"""Of what twice the rows would cost at twice the price: from there on `StepCosts` needs no more figures.  What is
cheaper by less no draft is verified for (`depth.WORTH_IT`)."""
_SURE_FROM = 64
"""Rows below which that may be the step from one kernel to another."""
_FEW_ROWS = 8
"""Rows up to which steps are made again when costs are known already."""
_REPEATS = 3
_SAME_SHAPE = 1.5
"""How much more the cost of few rows may have changed than that of one, for known costs to be believed."""
_WIDTH = 0.1
"""How far, in doublings of rows, a step tells of its neighbours."""


class StepCosts:
    """Seconds by rows.

    Args:
        measured_s: seconds for some numbers of rows; between and beyond them costs are read off linearly.
    """

    def __init__(self, measured_s: dict[int, float]) -> None:
        rows = np.array(sorted(measured_s), np.float64)
        # More rows never cost less, and what holds a step up makes it longer, never shorter: so no step costs more than
        # what one of more rows was seen to take.
        seconds = np.minimum.accumulate(np.array([measured_s[int(count)] for count in rows])[::-1])[::-1]
        self.rows: Float64s = np.array(KNOTS, np.float64)
        self._shape: Float64s = np.interp(self.rows, rows, seconds)
        beyond = self.rows > rows[-1]
        self._shape[beyond] = seconds[-1] * self.rows[beyond] / rows[-1]
        self._scale = 0.0
        """A logarithm, as are the local differences."""
        self._local: Float64s = np.zeros(len(self.rows))
        self.seconds: Float64s = self._shape.copy()

    def seconds_for(self, num_rows: int) -> float:
        """What a step of so many rows is expected to take; in proportion to them beyond the last of `KNOTS`."""
        beyond = max(1.0, num_rows / self.rows[-1])
        return float(np.interp(num_rows, self.rows, self.seconds) * beyond)

    def observe(self, num_rows: int, seconds: float) -> None:
        """Take the time of a step that had decodes and verify windows only."""
        self._scale += _observe(self.rows, self._shape, self._local, self.seconds, self._scale, num_rows, seconds)


@numba.njit(cache=True, **INNER)
def read_off(num_rows, knots, values):  # type: ignore[no-untyped-def]
    """As `np.interp` of one number, which takes 2 s to compile."""
    if num_rows <= knots[0]:
        return values[0]
    low, high = 0, len(knots) - 1
    if num_rows >= knots[high]:
        return values[high]
    while high - low > 1:
        middle = (low + high) // 2
        if knots[middle] <= num_rows:
            low = middle
        else:
            high = middle
    return values[low] + (values[high] - values[low]) * (num_rows - knots[low]) / (knots[high] - knots[low])


@numba.njit(cache=True)
def _observe(rows, shape, local, costs, scale, num_rows, seconds):  # type: ignore[no-untyped-def]
    """Bring ``local`` and ``costs`` up to date; what is to be added to ``scale``."""
    difference = np.log(max(seconds, 1e-9) / read_off(num_rows, rows, costs))
    believed = _MOST_AT_ONCE * min(1.0, _HELD_UP / max(abs(difference), 1e-9))
    difference = min(max(difference, -believed), believed)
    scale += _RATE * difference
    highest = 0.0
    for knot in range(len(rows)):
        nearness = np.exp(-abs(np.log2(rows[knot] / num_rows)) / _WIDTH)
        local[knot] += _LOCAL_RATE * nearness * difference - _FADING * local[knot]
        # More rows never cost less: where noise says so, the lower cost is not believed.
        highest = max(highest, shape[knot] * np.exp(scale + local[knot]))
        costs[knot] = highest
    return _RATE * difference


def measure_costs(runner: ModelRunner[Logits], row_counts: Sequence[int], repeats: int = 1) -> StepCosts:
    """The costs of a model that nobody uses yet; see `measure_seconds`."""
    return StepCosts(measure_seconds(runner, row_counts, repeats))


def rescaled(known_s: Mapping[int, float], runner: ModelRunner[Logits]) -> dict[int, float] | None:
    """Seconds that were measured at another time, brought to what this machine does now by a few steps.

    Two small steps tell the proportion; a larger one, another at each start, finds out sooner or later whatever held
    the machine up while it was measured.

    Args:
        known_s: seconds for some numbers of rows.

    Returns:
        the same in proportion; None where the steps disagree on the proportion, so that the shape is another one.

    Raises:
        OutOfMemoryError: there is no room for these steps.
    """
    tried = [rows for rows in known_s if rows <= _FEW_ROWS]
    larger = [rows for rows in known_s if rows > tried[-1]]
    tried = [tried[0], tried[-1], *random.sample(larger, min(1, len(larger)))]
    ratios = [min(_seconds(runner, rows) for _ in range(_REPEATS)) / known_s[rows] for rows in tried]
    if max(ratios) > _SAME_SHAPE * min(ratios):
        return None
    return {rows: seconds * float(np.mean(ratios[:2])) for rows, seconds in known_s.items()}


def measure_seconds(
    runner: ModelRunner[Logits], row_counts: Sequence[int], repeats: int = 1, *, pages: Sequence[int] | None = None
) -> dict[int, float]:
    """Seconds of some steps, each row a sequence of one token.

    Args:
        row_counts: ascending; those that the device has no room for are left out, and those behind which costs are in
            proportion to rows.
        pages: one for each group, which nobody else uses, to write to; None: page 0, of a model that nobody uses yet.

    Raises:
        OutOfMemoryError: it has no room even for the first.
    """
    measured: dict[int, float] = {}
    for count in row_counts:
        try:
            measured[count] = min(_seconds(runner, count, pages) for _ in range(1 + repeats))
        except OutOfMemoryError:
            if not measured:
                raise
            break
        half = max((rows for rows in measured if 2 * rows <= count), default=None)
        if half and count >= _SURE_FROM and measured[count] > _IN_PROPORTION * measured[half] * count / half:
            break
    return measured


def _seconds(runner: ModelRunner[Logits], num_rows: int, pages: Sequence[int] | None = None) -> float:
    rows = np.arange(num_rows, dtype=np.int32)
    batch = StepBatch(
        token_ids=rows % runner.vocab_size,
        positions=np.zeros(num_rows, np.int32),
        cu_seqlens=np.arange(num_rows + 1, dtype=np.int32),
        context_lens=np.ones(num_rows, np.int32),
        block_tables=tuple(np.full((num_rows, 1), page, np.int32) for page in pages or [0] * len(runner.kv_groups)),
        logits_rows=rows,
    )
    began_s = perf_counter()
    logits = runner.forward(batch)
    # Asking for a number waits for a device that computes while the host goes on.
    runner.logprobs(logits, rows[:1], rows[:1], 0)
    return perf_counter() - began_s
