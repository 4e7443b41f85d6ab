"""Drafts from the target's own weights at fewer bits, over the target's own pages.

It keeps nothing of a sequence.  What a draft's forward reads are the keys and values that the target has computed, through
the target's own block tables; what it writes goes where the same step's verification writes anew before anybody reads:
from the last verified token, whose keys and values no plain step has computed either, to the end of the window that the
plan has reserved for this sequence alone.  So its context is exact, nothing has to be caught up with, and nothing to be
given back.  Each draft position is one ragged forward for all sequences that still draft; tokens are drawn as the target
draws them.  Knows nothing about what drafts are worth; who does is asked before each forward.
"""

from collections.abc import Sequence as Ordered
from time import perf_counter
from typing import Generic

from helix_gateway.core.protocols import Logits, ModelRunner
from helix_gateway.core.step import SamplingRows
from helix_gateway.engine.drafters.base import NOTHING, DraftTokens
from helix_gateway.engine.drafters.draft_batch import DraftPart, build_draft_rows, grow_drafts
from helix_gateway.engine.drafters.growing_draft import GrowingDraft
from helix_gateway.engine.drafting import SELF, DraftingPolicy
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.sequence import Sequence

_DOUBT = 0.2
"""Two forms of one model that draw with one noise agree far more often than either is sure of its token: before more is
learned, a token that was given one half is believed right nine times of ten (docs/log.md)."""


class SelfDrafter(Generic[Logits]):
    """`engine.drafters.base.ChoosyDrafter` over another form of the target.

    Args:
        runner: it, over the target's pages: the same groups, the same vocabulary.
        cache: where the target's blocks are accounted.
        policy: asked whether drafting on is worth it, and told what forwards take.
    """

    def __init__(self, runner: ModelRunner[Logits], cache: PagedKVCache, policy: DraftingPolicy) -> None:
        self._runner = runner
        self._cache = cache
        self._policy = policy

    def begin_step(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[int]:
        """See `ChoosyDrafter`.  Whoever's prompt is not computed yet, but for its last token, waits for that."""
        return [
            depth if sequence.num_pending_tokens == 1 else 0 for sequence, depth in zip(sequences, depths, strict=True)
        ]

    def propose(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[DraftTokens]:
        """See `Drafter`; blocks for so many tokens behind each sequence's last must be its own."""
        drafts = [_begin(sequence, depth) for sequence, depth in zip(sequences, depths, strict=True)]
        growing = self._going_on(drafts)
        while growing:
            self._compute([_next_part(draft) for draft in growing])
            growing = self._going_on([draft for draft in growing if not draft.is_done])
        return [draft.as_drafted() if draft.token_ids else NOTHING for draft in drafts]

    def give_back(self) -> None:
        """Nothing is held."""

    def retire(self, sequence: Sequence) -> None:
        """Nothing is kept of a sequence."""

    def _going_on(self, drafts: list[GrowingDraft]) -> list[GrowingDraft]:
        if not drafts:
            return []
        goes_on = self._policy.goes_on([draft.sequence for draft in drafts], [draft.as_drafted() for draft in drafts])
        return [draft for draft, on in zip(drafts, goes_on, strict=True) if on]

    def _compute(self, parts: list[DraftPart[GrowingDraft]]) -> None:
        """Let each draft grow by a token."""
        began = perf_counter()
        grow_drafts(self._runner, self._cache, parts, self._rows)
        self._policy.observe(len(parts), perf_counter() - began)

    def _rows(self, drafts: list[GrowingDraft]) -> SamplingRows:
        return build_draft_rows(drafts, self._runner.vocab_size, self._runner.vocab_size, None)


def _begin(sequence: Sequence, depth: int) -> GrowingDraft:
    return GrowingDraft(
        sequence=sequence, key=sequence.key, source=SELF, depth=depth, stop_ids=sequence.stop_ids, doubt=_DOUBT
    )


def _next_part(draft: GrowingDraft) -> DraftPart[GrowingDraft]:
    """The last token there is, verified or drafted."""
    last = draft.token_ids[-1] if draft.token_ids else draft.sequence.token_ids[-1]
    return DraftPart(draft, draft.target_position - 1, [last], draws=True)
