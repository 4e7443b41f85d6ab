"""From a plan and its draft tokens to the flat arrays of one step.

Knows how sequences lie in the flat batch, and nothing else of the engine's policy.
"""

from collections.abc import Hashable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from helix_gateway.core.step import Int32s, LogitEdits, SamplingRows, StepBatch, UInt32s
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
    sampled_rows: range
    """Flat rows whose logits choose a token: the last verified token's and each draft token's."""
    scored_prompt_rows: range
    """Flat rows whose logits score the prompt's next token, those already scored left out."""

    @property
    def sequence(self) -> Sequence:
        """Whose rows these are."""
        return self.scheduled.sequence

    @property
    def num_rows(self) -> int:
        """Verified tokens computed and draft tokens."""
        return self.scheduled.num_tokens + len(self.draft_tokens)

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities of any of its rows were asked for."""
        return bool(self.scored_prompt_rows) or self.sequence.request.sampling.logprobs is not None

    def position(self, row: int) -> int:
        """Where the token of a flat row stands in its sequence."""
        return self.scheduled.start + row - self.first_row

    def token_ids(self) -> list[int]:
        """The tokens of its rows."""
        start = self.scheduled.start
        return self.sequence.token_ids[start : start + self.scheduled.num_tokens] + self.draft_tokens


_NO_ROWS = range(0)


def _window(scheduled: ScheduledSequence, draft_tokens: list[int], first_row: int) -> Window:
    sampled = _NO_ROWS
    if scheduled.samples:
        first = first_row + scheduled.num_tokens - 1
        sampled = range(first, first + 1 + len(draft_tokens))
    return Window(scheduled, draft_tokens, first_row, sampled, _scored_prompt_rows(scheduled, first_row))


def _scored_prompt_rows(scheduled: ScheduledSequence, first_row: int) -> range:
    sequence, start = scheduled.sequence, scheduled.start
    if not sequence.wants_prompt_logprobs:
        return _NO_ROWS
    first = max(start, len(sequence.prompt_logprobs) - 1)
    end = min(start + scheduled.num_tokens, sequence.num_prompt_tokens - 1)
    return range(first_row + first - start, first_row + max(first, end) - start)


def lay_out(scheduled: Ordered[ScheduledSequence], drafts: Ordered[list[int]]) -> list[Window]:
    """Give each scheduled sequence its rows, in order."""
    windows, row = [], 0
    for entry, draft in zip(scheduled, drafts, strict=True):
        windows.append(_window(entry, draft, row))
        row += windows[-1].num_rows
    return windows


def build_step_batch(windows: Ordered[Window], cache: PagedKVCache) -> StepBatch:
    """The flat arrays of the forward."""
    starts = np.array([window.scheduled.start for window in windows], np.int32)
    lengths = np.array([window.num_rows for window in windows], np.int32)
    return StepBatch(
        token_ids=np.array([token for window in windows for token in window.token_ids()], np.int32),
        positions=_ramps(starts, lengths),
        cu_seqlens=np.concatenate([_ZERO, np.cumsum(lengths, dtype=np.int32)]),
        context_lens=starts + lengths,
        block_tables=block_tables([window.sequence.key for window in windows], cache),
        logits_rows=logits_rows(windows),
    )


_ZERO = np.zeros(1, np.int32)


def _ramps(starts: Int32s, lengths: Int32s) -> Int32s:
    """``starts[i], starts[i] + 1, …`` of ``lengths[i]`` numbers each, one after the other; int32 [sum of lengths]."""
    behind = np.cumsum(lengths, dtype=np.int32)
    return np.arange(behind[-1] if behind.size else 0, dtype=np.int32) + np.repeat(starts + lengths - behind, lengths)


def block_tables(keys: Ordered[Hashable], cache: PagedKVCache) -> tuple[Int32s, ...]:
    """For each group of one model, [num_seqs, max_blocks]; the sequences by their keys in the cache."""
    widths = zip(*([table.num_entries for table in cache.tables(key)] for key in keys), strict=True)
    tables = tuple(np.zeros((len(keys), max(width)), np.int32) for width in widths)
    cache.fill_tables(keys, tables)
    return tables


def logits_rows(windows: Ordered[Window]) -> Int32s:
    """Flat rows whose logits somebody reads, ascending."""
    if not any(window.scored_prompt_rows for window in windows):
        return _sampled_rows(windows)
    rows = (row for window in windows for row in sorted({*window.scored_prompt_rows, *window.sampled_rows}))
    return np.fromiter(rows, np.int32)


def _sampled_rows(windows: Ordered[Window]) -> Int32s:
    """Flat rows that choose a token, ascending."""
    firsts = np.array([window.sampled_rows.start for window in windows], np.int32)
    return _ramps(firsts, np.array([len(window.sampled_rows) for window in windows], np.int32))


def build_sampling_rows(windows: Ordered[Window], rows: Int32s, vocab_size: int) -> SamplingRows:
    """How each row of each verify window is to be sampled, in the windows' order.

    Args:
        rows: `logits_rows` of the windows.

    Raises:
        ConstraintFailedError: a sequence's constraint raised.
    """
    windows = [window for window in windows if window.sampled_rows]
    counts = np.array([len(window.sampled_rows) for window in windows], np.int32)
    firsts = np.array([window.position(window.sampled_rows.start) + 1 for window in windows], np.int32)
    return sampling_rows(
        [window.sequence for window in windows],
        counts,
        vocab_size,
        logits_index=np.searchsorted(rows, _sampled_rows(windows)).astype(np.int32),
        position=_ramps(firsts, counts),
        edits=join_edits([row for w in windows for row in w.sequence.edits.along(w.draft_tokens)]),
        allowed=join_masks([(w.sequence, w.draft_tokens) for w in windows], vocab_size),
    )


def sampling_rows(
    sequences: Ordered[Sequence],
    counts: Int32s,
    vocab_size: int,
    *,
    logits_index: Int32s,
    position: Int32s,
    edits: LogitEdits,
    allowed: UInt32s | None,
) -> SamplingRows:
    """Rows that are sampled by what their sequences' requests ask for.

    Args:
        counts: how many rows each sequence has.
        logits_index, position, edits, allowed: of the rows, as `SamplingRows` has them.
    """
    params = [sequence.request.sampling for sequence in sequences]

    def spread(values: list[float], dtype: type[np.generic]) -> npt.NDArray[Any]:
        return np.repeat(np.array(values, dtype), counts)

    return SamplingRows(
        logits_index=logits_index,
        seed=spread([p.seed & 0xFFFF_FFFF_FFFF_FFFF for p in params], np.uint64),
        choice=spread([sequence.index for sequence in sequences], np.int32),
        position=position,
        temperature=spread([p.temperature for p in params], np.float32),
        top_k=spread([min(p.top_k or vocab_size, vocab_size) for p in params], np.int32),
        top_p=spread([p.top_p for p in params], np.float32),
        min_p=spread([p.min_p for p in params], np.float32),
        edits=edits,
        allowed=allowed,
    )
