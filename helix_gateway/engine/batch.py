"""From a plan and its draft tokens to the flat arrays of one step.

Knows how sequences lie in the flat batch, and nothing else of the engine's policy.
"""

from collections.abc import Sequence as Ordered
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from helix_gateway.core.step import Int32s, LogitEdits, SamplingRows, StepBatch, UInt32s
from helix_gateway.engine.batch_tables import BatchTables
from helix_gateway.engine.option_records import option_columns
from helix_gateway.engine.plan import ScheduledSequence
from helix_gateway.engine.row_layout import RowLayout, ramps, row_layout
from helix_gateway.engine.sequence import Sequence
from helix_gateway.engine.token_edits import NO_EDITS, join_edits
from helix_gateway.engine.token_masks import join_masks


class Window(NamedTuple):
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
        return bool(self.scored_prompt_rows) or self.scheduled.sequence.request.sampling.logprobs is not None

    def position(self, row: int) -> int:
        """Where the token of a flat row stands in its sequence."""
        return self.scheduled.start + row - self.first_row

    def token_ids(self) -> list[int]:
        """The tokens of its rows."""
        scheduled = self.scheduled
        start = scheduled.start
        return scheduled.sequence.token_ids[start : start + scheduled.num_tokens] + self.draft_tokens


_NO_ROWS = range(0)


def _window(scheduled: ScheduledSequence, draft_tokens: list[int], first_row: int) -> Window:
    sampled = scored = _NO_ROWS
    if scheduled.samples:
        first = first_row + scheduled.num_tokens - 1
        sampled = range(first, first + 1 + len(draft_tokens))
    if scheduled.sequence.wants_prompt_logprobs:
        scored = _scored_prompt_rows(scheduled, first_row)
    return Window(scheduled, draft_tokens, first_row, sampled, scored)


def _scored_prompt_rows(scheduled: ScheduledSequence, first_row: int) -> range:
    sequence, start = scheduled.sequence, scheduled.start
    first = max(start, len(sequence.prompt_logprobs) - 1)
    end = min(start + scheduled.num_tokens, sequence.num_prompt_tokens - 1)
    return range(first_row + first - start, first_row + max(first, end) - start)


def lay_out(scheduled: Ordered[ScheduledSequence], drafts: Ordered[list[int]]) -> list[Window]:
    """Give each scheduled sequence its rows, in order."""
    windows, row = [], 0
    for entry, draft in zip(scheduled, drafts, strict=True):
        windows.append(_window(entry, draft, row))
        row += entry.num_tokens + len(draft)
    return windows


def build_step_batch(windows: Ordered[Window], tables: BatchTables) -> StepBatch:
    """The flat arrays of the forward."""
    layout = row_layout(
        tuple([w.scheduled.num_tokens + len(w.draft_tokens) for w in windows]),
        tuple([len(w.sampled_rows) for w in windows]),
    )
    starts = np.array([window.scheduled.start for window in windows], np.int32)
    return StepBatch(
        token_ids=np.array([token for window in windows for token in window.token_ids()], np.int32),
        positions=starts if layout.are_single else ramps(starts, layout.num_rows),
        cu_seqlens=layout.cu_seqlens,
        context_lens=starts + layout.num_rows,
        block_tables=tables.of([window.scheduled.sequence.key for window in windows]),
        logits_rows=_logits_rows(windows, layout),
    )


def _logits_rows(windows: Ordered[Window], layout: RowLayout) -> Int32s:
    """Flat rows whose logits somebody reads, ascending."""
    if not any(window.scored_prompt_rows for window in windows):
        return layout.sampled_rows
    rows = (row for window in windows for row in sorted({*window.scored_prompt_rows, *window.sampled_rows}))
    return np.fromiter(rows, np.int32)


def build_sampling_rows(windows: Ordered[Window], batch: StepBatch, vocab_size: int) -> SamplingRows:
    """How each row of each verify window is to be sampled, in the windows' order, but for what constraints allow.

    Args:
        batch: that of the windows.
    """
    windows = [window for window in windows if window.sampled_rows]
    sequences = [window.scheduled.sequence for window in windows]
    counts = tuple([len(window.sampled_rows) for window in windows])
    sampled = batch.logits_rows
    if sum(counts) < len(sampled):  # prompts are scored
        sampled = np.array([row for window in windows for row in window.sampled_rows], np.int32)
        places = np.searchsorted(batch.logits_rows, sampled).astype(np.int32)
    else:
        places = np.arange(len(sampled), dtype=np.int32)
    return sampling_rows(
        sequences,
        counts,
        vocab_size,
        logits_index=places,
        position=batch.positions[sampled] + np.int32(1),  # a token's logits choose the next one
        edits=_edits_of(windows) if any(sequence.edits.ever_any for sequence in sequences) else NO_EDITS,
        allowed=None,
    )


def with_masks(rows: SamplingRows, windows: Ordered[Window], vocab_size: int) -> SamplingRows:
    """The rows of these windows with the masks of their sequences' constraints, if there are any.

    Filling masks takes long, so it is left until a device computes the logits.

    Raises:
        ConstraintFailedError: a sequence's constraint raised.
    """
    if all(window.scheduled.sequence.constraint is None for window in windows):
        return rows
    sampled = [(w.scheduled.sequence, w.draft_tokens) for w in windows if w.sampled_rows]
    return replace(rows, allowed=join_masks(sampled, vocab_size))


def _edits_of(windows: Ordered[Window]) -> LogitEdits:
    return join_edits([row for w in windows for row in w.sequence.edits.along(w.draft_tokens)])


def sampling_rows(
    sequences: Ordered[Sequence],
    counts: tuple[int, ...],
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
    options = option_columns(tuple([sequence.option_record for sequence in sequences]), counts, vocab_size)
    return SamplingRows(
        logits_index=logits_index,
        seed=options.seed,
        choice=options.choice,
        position=position,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        edits=edits,
        allowed=allowed,
    )
