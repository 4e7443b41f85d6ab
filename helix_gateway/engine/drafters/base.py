"""The Protocol of everything that proposes draft tokens.

A drafter may be wrong at will: whatever it proposes, the text is the same.  It knows nothing about acceptance.
"""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from helix_gateway.core.step import Float32s, Int32s
from helix_gateway.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """How one sequence may go on, as far as its drafter cared to say."""

    source: str
    """What its acceptance is learned and counted under: the drafter, or which of its sources."""
    token_ids: Int32s
    """[num_draft_tokens], up to the depth asked for."""
    confidences: Float32s
    """[num_draft_tokens], the drafter's own probability for each token if those before it are right; steers depth,
    never acceptance."""
    beside: "DraftTokens | None" = None
    """What another drafter proposed in the same place: never verified, but what it was worth is learned from."""
    is_reading: bool = False
    """Whether it is empty because the drafter is yet reading the sequence, to draft at a later step."""

    def first(self, count: int) -> "DraftTokens":
        """The first ``count`` of them, and nothing of what was proposed beside."""
        if count >= len(self.token_ids) and self.beside is None:
            return self
        return DraftTokens(self.source, self.token_ids[:count], self.confidences[:count], is_reading=self.is_reading)


NOTHING = DraftTokens("none", np.empty(0, np.int32), np.empty(0, np.float32))
READING = replace(NOTHING, is_reading=True)


class Drafter(Protocol):
    """Proposes how sequences may go on."""

    def propose(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[DraftTokens]:
        """Up to ``depths[i]`` tokens to follow ``sequences[i].token_ids``, for each i; every depth is above 0."""

    def retire(self, sequence: Sequence) -> None:
        """Forget a sequence, which has ended; nothing happens if it was never drafted for."""


class ChoosyDrafter(Drafter, Protocol):
    """One that cannot draft for everybody at every step, and says so before anybody reckons with its drafts."""

    def begin_step(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[int]:
        """Most tokens, up to ``depths[i]``, that it could draft for ``sequences[i]`` at this step; 0: it cannot.

        Called once at each step, with all that may have drafts, before `propose` is called for some of them or none.
        """

    def give_back(self) -> None:
        """Give back what memory is held between two steps: there was too little to propose."""
