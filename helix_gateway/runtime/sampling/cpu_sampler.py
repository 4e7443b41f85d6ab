"""Sampling on a CPU: hands rows of logits and the numbers of their options to the compiled kernels.

Knows nothing about sequences, pages or what the logits came from.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np
import torch

from helix_gateway.core.step import Float32s, Int32s, LogprobRows, SamplingRows, UInt32s
from helix_gateway.runtime.cpu.threads import configure_threads
from helix_gateway.runtime.sampling import cpu_kernels, noise
from helix_gateway.runtime.sampling.options import log_probabilities, min_differences

# A second thread is woken for more tokens than these; one alone needs 0.1 ms for them, and where other processes
# want the cores a thread may come a whole time slice, 8 to 16 ms, late (measured: benchmarks/sampling_bench.py).
_TOKENS_ALONE = 1 << 17
# The same where nobody draws, and a row is read once: 16 rows of 49,152 tokens take one thread half the processor time
# that each of two takes which wake up for them (docs/log.md).
_GREEDY_TOKENS_ALONE = 1 << 20


class CpuSampler:
    """Chooses tokens from rows of logits in memory.

    Args:
        vocab_size: columns of the logits.
    """

    def __init__(self, vocab_size: int) -> None:
        configure_threads()  # before the first parallel region
        self._vocab_size = vocab_size

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> Int32s:
        """Choose one token for each sampling row.

        Args:
            logits: float32 [rows, vocab]; left as they are.
            rows: options and noise counters, see `SamplingRows`.

        Returns:
            int32 [num_samples].
        """
        count = rows.logits_index.size
        out = np.empty(count, np.int32)
        if count * self._vocab_size <= _GREEDY_TOKENS_ALONE and _want_greatest(rows):
            cpu_kernels.greatest_of_rows(_array(logits), rows.logits_index, out)
            return out
        options = (_keys(rows), rows.temperature, rows.top_k, rows.top_p, min_differences(rows))
        edits = (rows.edits.rows, rows.edits.token_ids, rows.edits.scale, rows.edits.shift)
        allowed = np.empty((count, 0), np.uint32) if rows.allowed is None else rows.allowed
        with self._threads(count, _TOKENS_ALONE if rows.temperature.any() else _GREEDY_TOKENS_ALONE):
            cpu_kernels.sample_rows(_array(logits), rows.logits_index, options, edits, allowed, out)
        return out

    def logprobs(self, logits: torch.Tensor, logits_index: Int32s, token_ids: Int32s, top: int) -> LogprobRows:
        """Log-probabilities of the raw rows.

        Args:
            logits: float32 [rows, vocab]; left as they are.
            logits_index: int32 [n], rows of the logits.
            token_ids: int32 [n], the token of each row to report.
            top: how many of each row's likeliest tokens to report.
        """
        n, top = logits_index.size, min(top, self._vocab_size)
        totals, ranks = np.empty(n, np.int64), np.empty(n, np.int32)
        differences, top_differences = np.empty(n, np.float32), np.empty((n, top), np.float32)
        top_ids = np.empty((n, top), np.int32)
        with self._threads(n, _TOKENS_ALONE):
            cpu_kernels.logprob_rows(
                _array(logits), logits_index, token_ids, totals, differences, ranks, top_ids, top_differences
            )
        return LogprobRows(
            logprobs=log_probabilities(differences[:, None], totals[:, None])[:, 0],
            ranks=ranks,
            top_ids=top_ids,
            top_logprobs=log_probabilities(top_differences, totals[:, None]),
        )

    @contextmanager
    def _threads(self, rows: int, tokens_alone: int) -> Iterator[None]:
        """As many threads as these rows deserve, one for up to so many tokens."""
        threads = numba.get_num_threads()
        if rows * self._vocab_size > tokens_alone or threads == 1:
            yield
            return
        numba.set_num_threads(1)
        try:
            yield
        finally:
            numba.set_num_threads(threads)


def _want_greatest(rows: SamplingRows) -> bool:
    """Whether each row's token is that of its greatest logit as it stands, so that nothing but logits need be looked at."""
    return rows.allowed is None and not rows.edits.rows.size and not rows.temperature.any()


def _keys(rows: SamplingRows) -> UInt32s:
    """As `noise.row_keys`, uint32 [2, num_samples]; anything where all rows are greedy, and there is no noise."""
    if not rows.temperature.any():
        return np.empty((2, rows.temperature.size), np.uint32)
    return noise.row_keys(rows.seed, rows.choice, rows.position)


def _array(logits: torch.Tensor) -> Float32s:
    """The same memory as numpy sees it, or a copy where it is not contiguous."""
    array: Float32s = logits.detach().contiguous().numpy()
    return array
