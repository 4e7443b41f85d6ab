"""All drafters of an engine as one: first what is free, then, for those whom the policy names, what costs.

Each sequence goes on with the draft that is expected to bring it more.  Knows nothing about how either is made.
"""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace

from helix_gateway.engine.drafters.base import NOTHING, ChoosyDrafter, Drafter, DraftTokens
from helix_gateway.engine.drafters.guarded import GuardedChoosyDrafter, GuardedDrafter
from helix_gateway.engine.drafters.resting import RestingDrafter
from helix_gateway.engine.drafting import DraftingPolicy
from helix_gateway.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class CostlyDrafter:
    """A drafter that computes something, and who says when it is asked."""

    drafter: ChoosyDrafter
    policy: DraftingPolicy


class DraftChain:
    """What the decoder asks for drafts.

    Args:
        free: asked for everybody who may have drafts.
        costly: asked where its policy says so; None: there is none.
        vocab_size: the target's.
    """

    def __init__(self, free: Drafter, costly: CostlyDrafter | None, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._free = GuardedDrafter(free, vocab_size)
        self.num_asked = 0
        """For how many of the last proposals what costs was asked."""
        self._costly: CostlyDrafter | None = None
        if costly is not None:
            self.join(costly)

    def join(self, costly: CostlyDrafter) -> None:
        """Ask this drafter too from the next step on, whose sequences it may never have heard of."""
        guarded = GuardedChoosyDrafter(RestingDrafter(costly.drafter), self._vocab_size)
        self._costly = CostlyDrafter(guarded, costly.policy)

    def propose(self, sequences: Ordered[Sequence], depths: Ordered[int], num_decodes: int) -> list[DraftTokens]:
        """As `Drafter` has it, in a step in which so many sequences get a token."""
        self.num_asked = 0
        drafts = self._free.propose(sequences, depths)
        return (
            drafts if self._costly is None else self._with_costly(self._costly, sequences, depths, drafts, num_decodes)
        )

    def _with_costly(
        self,
        costly: CostlyDrafter,
        sequences: Ordered[Sequence],
        depths: Ordered[int],
        free: list[DraftTokens],
        num_decodes: int,
    ) -> list[DraftTokens]:
        able = costly.drafter.begin_step(sequences, depths)
        asked = costly.policy.ask(sequences, free, able, num_decodes)
        chosen = [index for index, depth in enumerate(asked) if depth]
        self.num_asked = len(chosen)
        if not chosen:
            return free
        others = [NOTHING] * len(free)
        proposed = costly.drafter.propose([sequences[i] for i in chosen], [asked[i] for i in chosen])
        for index, draft in zip(chosen, proposed, strict=True):
            others[index] = draft
        better = costly.policy.better(sequences, others, free)
        pairs = ((a, b) if first else (b, a) for a, b, first in zip(others, free, better, strict=True))
        return [_beside(draft, other) for draft, other in pairs]

    def retire(self, sequence: Sequence) -> None:
        """Let every drafter forget a sequence, which has ended."""
        self._free.retire(sequence)
        if self._costly is not None:
            self._costly.drafter.retire(sequence)


def _beside(draft: DraftTokens, other: DraftTokens) -> DraftTokens:
    if not len(draft.token_ids):
        return other if other.is_reading else draft
    return replace(draft, beside=other) if len(other.token_ids) else draft
