"""From a plan and its draft tokens to the flat arrays of one step.

Knows how sequences lie in the flat batch, and nothing else of the engine's policy.
"""

from collections.abc import Hashable
from collections.abc import Sequence as Ordered
from typing import NamedTuple

import numpy as np

from helix_gateway.core.step import Int32s, LogitEdits, SamplingRows, StepBatch, UInt32s
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.option_records import join_records
from helix_gateway.engine.plan import ScheduledSequence
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


def build_step_batch(windows: Ordered[Window], cache: PagedKVCache) -> StepBatch:
    """The flat arrays of the forward."""
    starts = np.array([window.scheduled.start for window in windows], np.int32)
    behind = [w.first_row + w.scheduled.num_tokens + len(w.draft_tokens) for w in windows]
    cu_seqlens = np.array([0, *behind], np.int32)
    ends = cu_seqlens[1:]
    return StepBatch(
        token_ids=np.array([token for window in windows for token in window.token_ids()], np.int32),
        positions=_ramps(starts, ends),
        cu_seqlens=cu_seqlens,
        context_lens=starts + ends - cu_seqlens[:-1],
        block_tables=block_tables([window.scheduled.sequence.key for window in windows], cache),
        logits_rows=logits_rows(windows),
    )


def _ramps(starts: Int32s, ends: Int32s) -> Int32s:
    """``starts[i], starts[i] + 1, …`` up to place ``ends[i]``, at least one number each, one after the other; int32."""
    count = int(ends[-1]) if ends.size else 0
    if count == ends.size:  # of one number each: nobody has a prompt or drafts
        return starts
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    ramps: Int32s = np.arange(count, dtype=np.int32) + np.repeat(starts + lengths - ends, lengths)
    return ramps


def block_tables(keys: Ordered[Hashable], cache: PagedKVCache) -> tuple[Int32s, ...]:
    """For each group of one model, [num_seqs, max_blocks]; the sequences by their keys in the cache."""
    widths = zip(*[[table.num_entries for table in cache.tables(key)] for key in keys], strict=True)
    tables = tuple([np.zeros((len(keys), max(width)), np.int32) for width in widths])
    cache.fill_tables(keys, tables)
    return tables


def logits_rows(windows: Ordered[Window]) -> Int32s:
    """Flat rows whose logits somebody reads, ascending."""
    if not any(window.scored_prompt_rows for window in windows):
        return _sampled_rows([window for window in windows if window.sampled_rows])
    rows = (row for window in windows for row in sorted({*window.scored_prompt_rows, *window.sampled_rows}))
    return np.fromiter(rows, np.int32)


def _sampled_rows(windows: Ordered[Window]) -> Int32s:
    """Flat rows that choose a token, ascending; of windows that have some."""
    firsts = np.array([window.sampled_rows.start for window in windows], np.int32)
    return _ramps(firsts, _num_sampled(windows).cumsum(dtype=np.int32))


def _num_sampled(windows: Ordered[Window]) -> Int32s:
    return np.array([len(window.sampled_rows) for window in windows], np.int32)


def build_sampling_rows(windows: Ordered[Window], rows: Int32s, vocab_size: int) -> SamplingRows:
    """How each row of each verify window is to be sampled, in the windows' order.

    Args:
        rows: `logits_rows` of the windows.

    Raises:
        ConstraintFailedError: a sequence's constraint raised.
    """
    windows = [window for window in windows if window.sampled_rows]
    sequences = [window.scheduled.sequence for window in windows]
    counts = _num_sampled(windows)
    ends = counts.cumsum(dtype=np.int32)
    return sampling_rows(
        sequences,
        counts,
        vocab_size,
        logits_index=_places_of_sampled(windows, rows, int(ends[-1])),
        # A token's logits choose the next one: the first is the one behind the last verified token.
        position=_ramps(np.array([w.scheduled.start + w.scheduled.num_tokens for w in windows], np.int32), ends),
        edits=_edits_of(windows) if any(sequence.edits.ever_any for sequence in sequences) else NO_EDITS,
        allowed=join_masks([(w.scheduled.sequence, w.draft_tokens) for w in windows], vocab_size),
    )


def _places_of_sampled(windows: Ordered[Window], rows: Int32s, num_sampled: int) -> Int32s:
    """Where the sampled rows are among those whose logits are read; all of these, but where prompts are scored."""
    if num_sampled == len(rows):
        return np.arange(num_sampled, dtype=np.int32)
    return np.searchsorted(rows, _sampled_rows(windows)).astype(np.int32)


def _edits_of(windows: Ordered[Window]) -> LogitEdits:
    return join_edits([row for w in windows for row in w.sequence.edits.along(w.draft_tokens)])


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
    options = join_records([sequence.option_record for sequence in sequences]).repeat(counts)
    return SamplingRows(
        logits_index=logits_index,
        seed=options["seed"].copy(),  # columns lie apart in records; samplers want them whole
        choice=options["choice"].copy(),
        position=position,
        temperature=options["temperature"].copy(),
        top_k=np.minimum(options["top_k"], np.int32(vocab_size)),
        top_p=options["top_p"].copy(),
        min_p=options["min_p"].copy(),
        edits=edits,
        allowed=allowed,
    )
