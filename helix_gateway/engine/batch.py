"""From a plan and its draft tokens to the flat arrays of one step.

Knows how sequences lie in the flat batch, and nothing else of the engine's policy.
"""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from helix_gateway.core.step import Int32s, SamplingRows, StepBatch
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.plan import ScheduledSequence
from helix_gateway.engine.sequence import Sequence
from helix_gateway.engine.token_edits import join_edits
from helix_gateway.engine.token_masks import join_masks


@dataclass(frozen=True, slots=True)
class Window:
    """One scheduled sequence's rows of the flat batch."""

    scheduled: ScheduledSequence
    draft_tokens: list[int]
    first_row: int

    @property
    def sequence(self) -> Sequence:
        """Whose rows these are."""
        return self.scheduled.sequence

    @property
    def num_rows(self) -> int:
        """Verified tokens computed and draft tokens."""
        return self.scheduled.num_tokens + len(self.draft_tokens)

    @property
    def sampled_rows(self) -> range:
        """Flat rows whose logits choose a token: the last verified token's and each draft token's."""
        if not self.scheduled.samples:
            return range(0)
        first = self.first_row + self.scheduled.num_tokens - 1
        return range(first, first + 1 + len(self.draft_tokens))

    @property
    def scored_prompt_rows(self) -> range:
        """Flat rows whose logits score the prompt's next token, those already scored left out."""
        sequence, start = self.sequence, self.scheduled.start
        if not sequence.wants_prompt_logprobs:
            return range(0)
        first = max(start, len(sequence.prompt_logprobs) - 1)
        end = min(start + self.scheduled.num_tokens, sequence.num_prompt_tokens - 1)
        return range(self.first_row + first - start, self.first_row + max(first, end) - start)

    def position(self, row: int) -> int:
        """Where the token of a flat row stands in its sequence."""
        return self.scheduled.start + row - self.first_row

    def token_ids(self) -> list[int]:
        """The tokens of its rows."""
        start = self.scheduled.start
        return self.sequence.token_ids[start : start + self.scheduled.num_tokens] + self.draft_tokens


def lay_out(scheduled: Ordered[ScheduledSequence], drafts: Ordered[list[int]]) -> list[Window]:
    """Give each scheduled sequence its rows, in order."""
    windows, row = [], 0
    for entry, draft in zip(scheduled, drafts, strict=True):
        windows.append(Window(entry, draft, row))
        row += windows[-1].num_rows
    return windows


def build_step_batch(windows: Ordered[Window], cache: PagedKVCache) -> StepBatch:
    """The flat arrays of the forward."""
    starts = [window.scheduled.start for window in windows]
    lengths = [window.num_rows for window in windows]
    return StepBatch(
        token_ids=np.array([token for window in windows for token in window.token_ids()], np.int32),
        positions=np.concatenate(
            [np.arange(start, start + length, dtype=np.int32) for start, length in zip(starts, lengths, strict=True)]
        ),
        cu_seqlens=np.array([0, *accumulate(lengths)], np.int32),
        context_lens=np.array(starts, np.int32) + np.array(lengths, np.int32),
        block_tables=_block_tables(windows, cache),
        logits_rows=logits_rows(windows),
    )


def _block_tables(windows: Ordered[Window], cache: PagedKVCache) -> tuple[Int32s, ...]:
    keys = [window.sequence.key for window in windows]
    widths = zip(*([table.num_entries for table in cache.tables(key)] for key in keys), strict=True)
    tables = tuple(np.zeros((len(keys), max(width)), np.int32) for width in widths)
    cache.fill_tables(keys, tables)
    return tables


def logits_rows(windows: Ordered[Window]) -> Int32s:
    """Flat rows whose logits somebody reads, ascending."""
    rows = (row for window in windows for row in sorted({*window.scored_prompt_rows, *window.sampled_rows}))
    return np.fromiter(rows, np.int32)


def build_sampling_rows(windows: Ordered[Window], rows: Int32s, vocab_size: int) -> SamplingRows:
    """How each row of each verify window is to be sampled, in the windows' order.

    Args:
        rows: `logits_rows` of the windows.

    Raises:
        ConstraintFailedError: a sequence's constraint raised.
    """
    params = [window.sequence.request.sampling for window in windows]
    counts = [len(window.sampled_rows) for window in windows]
    flat = np.array([row for window in windows for row in window.sampled_rows], np.int32)

    def spread(values: list[float], dtype: type[np.generic]) -> npt.NDArray[Any]:
        return np.repeat(np.array(values, dtype), counts)

    return SamplingRows(
        logits_index=np.searchsorted(rows, flat).astype(np.int32),
        seed=np.repeat(np.array([p.seed & 0xFFFF_FFFF_FFFF_FFFF for p in params], np.uint64), counts),
        choice=spread([window.sequence.index for window in windows], np.int32),
        position=np.array([window.position(row) + 1 for window in windows for row in window.sampled_rows], np.int32),
        temperature=spread([p.temperature for p in params], np.float32),
        top_k=spread([min(p.top_k or vocab_size, vocab_size) for p in params], np.int32),
        top_p=spread([p.top_p for p in params], np.float32),
        min_p=spread([p.min_p for p in params], np.float32),
        edits=join_edits(
            [
                edits
                for window in windows
                if window.sampled_rows
                for edits in window.sequence.edits.along(window.draft_tokens)
            ]
        ),
        allowed=join_masks([(w.sequence, w.draft_tokens) for w in windows if w.sampled_rows], vocab_size),
    )
