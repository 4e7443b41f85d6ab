"""The Protocol of everything that proposes draft tokens.

A drafter may be wrong at will: whatever it proposes, the text is the same.  It knows nothing about acceptance.
"""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Protocol

from helix_gateway.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """Proposals for some sequences, ragged: as many for each as the drafter cared to make, up to its depth."""

    token_ids: list[list[int]]
    confidences: list[list[float]] | None = None
    """The drafter's own probability for each token; steers depth, never acceptance."""


class Drafter(Protocol):
    """Proposes how sequences may go on."""

    @property
    def name(self) -> str:
        """What its work is counted under."""

    def propose(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> DraftTokens:
        """Up to ``depths[i]`` tokens to follow ``sequences[i].token_ids``, for each i."""
