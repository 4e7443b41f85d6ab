"""From growing drafts to the flat arrays of a drafting model's forward, how its rows are sampled, and the forward itself.

Knows how sequences lie in the flat batch, and nothing of who is drafted for, nor why.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np

from helix_gateway.core.protocols import Logits, ModelRunner
from helix_gateway.core.step import Int32s, SamplingRows, StepBatch, UInt32s
from helix_gateway.engine.batch import sampling_rows
from helix_gateway.engine.batch_tables import block_tables
from helix_gateway.engine.drafters.growing_draft import GrowingDraft
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.token_edits import RowEdits, join_edits
from helix_gateway.engine.token_masks import join_masks

Draft = TypeVar("Draft", bound=GrowingDraft)


@dataclass(frozen=True, slots=True)
class DraftPart(Generic[Draft]):
    """What is computed for one draft."""

    draft: Draft
    start: int
    """Position of the first token."""
    token_ids: list[int]
    draws: bool
    """Whether the last token's logits give the draft's next one."""


def grow_drafts(
    runner: ModelRunner[Logits],
    cache: PagedKVCache,
    parts: Ordered[DraftPart[Draft]],
    rows_of: Callable[[list[Draft]], SamplingRows],
) -> None:
    """One forward: write the parts' keys and values, and let those drafts that draw grow by a token each.

    Args:
        rows_of: how the next token of each of some drafts is drawn.
    """
    batch = build_draft_batch(parts, cache)
    logits = runner.forward(batch)
    drawing = [part.draft for part in parts if part.draws]
    if drawing:
        token_ids = runner.sample(logits, rows_of(drawing))
        every = np.arange(len(drawing), dtype=np.int32)
        confidences = np.exp(runner.logprobs(logits, every, token_ids, 0).logprobs)
        for draft, token_id, confidence in zip(drawing, token_ids.tolist(), confidences.tolist(), strict=True):
            draft.append(token_id, confidence)


def build_draft_batch(parts: Ordered[DraftPart[Draft]], cache: PagedKVCache) -> StepBatch:
    """The flat arrays of the forward; wanted are the last rows of those that draw."""
    lengths = [len(part.token_ids) for part in parts]
    starts = np.array([part.start for part in parts], np.int32)
    ends = [0, *accumulate(lengths)]
    return StepBatch(
        token_ids=np.array([token for part in parts for token in part.token_ids], np.int32),
        positions=np.concatenate(
            [np.arange(part.start, part.start + len(part.token_ids), dtype=np.int32) for part in parts]
        ),
        cu_seqlens=np.array(ends, np.int32),
        context_lens=starts + np.array(lengths, np.int32),
        block_tables=block_tables([part.draft.key for part in parts], cache),
        logits_rows=np.array([end - 1 for end, part in zip(ends[1:], parts, strict=True) if part.draws], np.int32),
    )


def build_draft_rows(
    drafts: Ordered[GrowingDraft], vocab_size: int, target_vocab_size: int, allowed: UInt32s | None
) -> SamplingRows:
    """How the next token of each draft is drawn, one row each: as the target will draw the token at that place.

    Args:
        vocab_size: the draft model's.
        allowed: its tokens that mean something to the target, as `VocabularyTranslation.allowed` has them.
    """
    sequences = [draft.sequence for draft in drafts]
    edits = [draft.sequence.edits.along(draft.token_ids)[-1] for draft in drafts]
    if vocab_size != target_vocab_size:
        edits = [_below(vocab_size, row) for row in edits]
    return sampling_rows(
        sequences,
        (1,) * len(drafts),
        vocab_size,
        logits_index=np.arange(len(drafts), dtype=np.int32),
        position=np.array([draft.target_position for draft in drafts], np.int32),
        edits=join_edits(edits),
        allowed=_joined(
            None if allowed is None else np.repeat(allowed[None], len(drafts), axis=0),
            _constrained(drafts, vocab_size) if vocab_size == target_vocab_size else None,
        ),
    )


def build_likeliest_rows(num_drafts: int, vocab_size: int, allowed: UInt32s | None) -> SamplingRows:
    """The likeliest token of each row: for a model whose ids are not the target's, to which its options say nothing."""
    zeros, none = np.zeros(num_drafts, np.int32), np.zeros(num_drafts, np.float32)
    return SamplingRows(
        logits_index=np.arange(num_drafts, dtype=np.int32),
        seed=np.zeros(num_drafts, np.uint64),
        choice=zeros,
        position=zeros,
        temperature=none,
        top_k=np.full(num_drafts, vocab_size, np.int32),
        top_p=np.ones(num_drafts, np.float32),
        min_p=none,
        edits=join_edits([None] * num_drafts),
        allowed=None if allowed is None else np.repeat(allowed[None], num_drafts, axis=0),
    )


def _below(vocab_size: int, edits: RowEdits | None) -> RowEdits | None:
    if edits is None:
        return None
    known: Int32s = np.flatnonzero(edits.token_ids < vocab_size).astype(np.int32)
    return RowEdits(edits.token_ids[known], edits.scale[known], edits.shift[known])


def _constrained(drafts: Ordered[GrowingDraft], vocab_size: int) -> UInt32s | None:
    masks = join_masks([(draft.sequence, draft.token_ids) for draft in drafts], vocab_size)
    return None if masks is None else masks[np.cumsum([1 + len(draft.token_ids) for draft in drafts]) - 1]


def _joined(one: UInt32s | None, other: UInt32s | None) -> UInt32s | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other
