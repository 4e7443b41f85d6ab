"""What a step costs by the number of its rows: measured when the engine starts, refined by every step that is like it.

Kept at some numbers of rows and read between them linearly.  The measured shape is kept; a step that took longer or
shorter than expected moves the scale of all of it, and a little more the costs near its own number of rows, which fade
back to the shape.  Each is believed within bounds: a machine that is busy for a while makes everything dearer for that
while, and leaves nothing behind.  Knows nothing about drafts.
"""

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import numpy.typing as npt

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.core.protocols import Logits, ModelRunner
from helix_gateway.core.step import StepBatch

Float64s = npt.NDArray[np.float64]

KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
"""Numbers of rows."""
_RATE = 0.1
"""Share of what a step differed by that the scale takes over."""
_LOCAL_RATE = 0.03
"""The same for its own number of rows, beside the scale."""
_FADING = 0.01
"""Share of what is known of single numbers of rows that is forgotten with each step."""
_MOST_AT_ONCE = 0.3
"""Largest difference, as a logarithm, that one step is believed."""
_WIDTH = 0.7
"""How far, in doublings of rows, a step tells of its neighbours."""


class StepCosts:
    """Seconds by rows.

    Args:
        measured_s: seconds for some numbers of rows; between and beyond them costs are read off linearly.
    """

    def __init__(self, measured_s: dict[int, float]) -> None:
        rows = np.array(sorted(measured_s), np.float64)
        seconds = np.maximum.accumulate(np.array([measured_s[int(count)] for count in rows]))
        self.rows: Float64s = np.array(KNOTS, np.float64)
        self._shape: Float64s = np.interp(self.rows, rows, seconds)
        beyond = self.rows > rows[-1]
        self._shape[beyond] = seconds[-1] * self.rows[beyond] / rows[-1]
        self._scale = 0.0
        """A logarithm, as are the local differences."""
        self._local: Float64s = np.zeros(len(self.rows))
        self.seconds: Float64s = self._shape

    def seconds_for(self, num_rows: int) -> float:
        """What a step of so many rows is expected to take."""
        return float(np.interp(num_rows, self.rows, self.seconds))

    def observe(self, num_rows: int, seconds: float) -> None:
        """Take the time of a step that had decodes and verify windows only."""
        difference = np.clip(np.log(max(seconds, 1e-9) / self.seconds_for(num_rows)), -_MOST_AT_ONCE, _MOST_AT_ONCE)
        self._scale += _RATE * float(difference)
        distance = np.abs(np.log2(self.rows / num_rows))
        self._local = (1 - _FADING) * self._local + _LOCAL_RATE * np.exp(-distance / _WIDTH) * difference
        # More rows never cost less: where noise says so, the lower cost is not believed.
        self.seconds = np.maximum.accumulate(self._shape * np.exp(self._scale + self._local))


def measure_costs(runner: ModelRunner[Logits], row_counts: Sequence[int], repeats: int = 1) -> StepCosts:
    """The costs of a model that nobody uses yet: each row a sequence of one token, written to page 0.

    Args:
        row_counts: ascending; those that the device has no room for are left out.

    Raises:
        OutOfMemoryError: it has no room even for the first.
    """
    measured: dict[int, float] = {}
    for count in row_counts:
        try:
            measured[count] = min(_seconds(runner, count) for _ in range(1 + repeats))
        except OutOfMemoryError:
            if not measured:
                raise
            break
    return StepCosts(measured)


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
