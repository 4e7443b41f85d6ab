"""What a step costs by the number of its rows: measured when the engine starts, refined by every step that is like it.

Kept at some numbers of rows and read between them linearly.  A step that took longer or shorter than expected moves the
costs near its number of rows most and far ones little, in proportion and within bounds: a machine that is busy for a
moment, or contexts that grow, change the table by degrees.  Knows nothing about drafts.
"""

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import numpy.typing as npt

from helix_gateway.core.protocols import Logits, ModelRunner
from helix_gateway.core.step import StepBatch

Float64s = npt.NDArray[np.float64]

KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
"""Numbers of rows."""
_RATE = 0.1
"""Share of what a step differed by that its nearest knot takes over."""
_MOST_AT_ONCE = 0.3
"""Largest difference, as a logarithm, that one step is believed."""
_REACH = 0.7
"""How fast the influence of a step wanes with the distance in doublings of rows."""


class StepCosts:
    """Seconds by rows.

    Args:
        measured_s: seconds for some numbers of rows; between and beyond them costs are read off linearly.
    """

    def __init__(self, measured_s: dict[int, float]) -> None:
        rows = np.array(sorted(measured_s), np.float64)
        seconds = np.maximum.accumulate(np.array([measured_s[int(count)] for count in rows]))
        self.rows: Float64s = np.array(KNOTS, np.float64)
        self.seconds: Float64s = np.interp(self.rows, rows, seconds)
        beyond = self.rows > rows[-1]
        self.seconds[beyond] = seconds[-1] * self.rows[beyond] / rows[-1]

    def seconds_for(self, num_rows: int) -> float:
        """What a step of so many rows is expected to take."""
        return float(np.interp(num_rows, self.rows, self.seconds))

    def observe(self, num_rows: int, seconds: float) -> None:
        """Take the time of a step that had decodes and verify windows only."""
        difference = np.log(max(seconds, 1e-9) / self.seconds_for(num_rows))
        distance = np.abs(np.log2(self.rows / num_rows))
        moved = _RATE * np.exp(-distance / _REACH) * np.clip(difference, -_MOST_AT_ONCE, _MOST_AT_ONCE)
        # More rows never cost less: where noise says so, the larger number is not believed.
        self.seconds = np.maximum.accumulate(self.seconds * np.exp(moved))


def measure_costs(runner: ModelRunner[Logits], row_counts: Sequence[int], repeats: int = 1) -> StepCosts:
    """The costs of a model that nobody uses yet: each row a sequence of one token, written to page 0.

    Raises:
        OutOfMemoryError: the device cannot compute so many rows at once.
    """
    return StepCosts({count: min(_seconds(runner, count) for _ in range(1 + repeats)) for count in row_counts})


def _seconds(runner: ModelRunner[Logits], num_rows: int) -> float:
    rows = np.arange(num_rows, dtype=np.int32)
    batch = StepBatch(
        token_ids=rows % runner.vocab_size,
        positions=np.zeros(num_rows, np.int32),
        cu_seqlens=np.arange(num_rows + 1, dtype=np.int32),
        context_lens=np.ones(num_rows, np.int32),
        block_tables=tuple(np.zeros((num_rows, 1), np.int32) for _ in runner.kv_groups),
        logits_rows=rows,
    )
    began_s = perf_counter()
    logits = runner.forward(batch)
    # Asking for a number waits for a device that computes while the host goes on.
    runner.logprobs(logits, rows[:1], rows[:1], 0)
    return perf_counter() - began_s
