"""Sampling on a CPU: hands rows of logits and the numbers of their options to the compiled kernels.

Knows nothing about sequences, pages or what the logits came from.
"""

import numpy as np
import numpy.typing as npt
import torch

from helix_gateway.core.step import Float32s, Int32s, LogitEdits, LogprobRows, SamplingRows
from helix_gateway.runtime.cpu.threads import configure_threads
from helix_gateway.runtime.sampling import cpu_kernels
from helix_gateway.runtime.sampling.options import log_probabilities, row_options

_NO_SCRATCH = np.empty((0, 0), np.float32)


class CpuSampler:
    """Chooses tokens from rows of logits in memory.

    Args:
        vocab_size: columns of the logits.
    """

    def __init__(self, vocab_size: int) -> None:
        configure_threads()  # before the first parallel region
        self._vocab_size = vocab_size
        self._blocks = -(-vocab_size // cpu_kernels.BLOCK)
        self._nothing_banned = np.empty((0, 0), np.uint32)

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
        if count == 0:
            return out
        options = row_options(rows, self._vocab_size)
        copied = rows.allowed is not None or rows.edits.rows.size > 0
        cpu_kernels.sample_rows(
            logits.contiguous().numpy(),
            rows.logits_index,
            options.keys,
            options.greedy,
            options.inverse_temperature,
            options.top_k,
            options.share,
            options.min_difference,
            _edits_by_row(rows.edits, count),
            self._nothing_banned if rows.allowed is None else rows.allowed,
            self._scratch(count) if copied else _NO_SCRATCH,
            self._maxima(count),
            out,
        )
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
        cpu_kernels.logprob_rows(
            logits.contiguous().numpy(),
            logits_index,
            token_ids,
            self._scratch(n),
            self._maxima(n),
            totals,
            differences,
            ranks,
            top_ids,
            top_differences,
        )
        return LogprobRows(
            logprobs=log_probabilities(differences[:, None], totals[:, None])[:, 0],
            ranks=ranks,
            top_ids=top_ids,
            top_logprobs=log_probabilities(top_differences, totals[:, None]),
        )

    def _scratch(self, rows: int) -> Float32s:
        return np.empty((rows, self._vocab_size), np.float32)

    def _maxima(self, rows: int) -> Float32s:
        return np.empty((rows, self._blocks), np.float32)


def _edits_by_row(edits: LogitEdits, count: int) -> tuple[npt.NDArray[np.int64], Int32s, Float32s, Float32s]:
    """Where each row's edits begin ([count + 1]), and the edits."""
    starts = np.searchsorted(edits.rows, np.arange(count + 1)).astype(np.int64)
    return starts, edits.token_ids, edits.scale, edits.shift
