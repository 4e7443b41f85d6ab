"""A draft while it is written, token by token, whoever computes it.

Knows nothing about models, nor where anybody's keys and values lie.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from helix_gateway.engine.drafters.base import DraftTokens
from helix_gateway.engine.sequence import Sequence


@dataclass(slots=True, eq=False, kw_only=True)
class GrowingDraft:
    """One sequence's draft."""

    sequence: Sequence
    key: Hashable
    """Names the tables that its keys and values lie in."""
    source: str
    """As `DraftTokens` has it."""
    depth: int
    """Most tokens that it may have."""
    stop_ids: frozenset[int]
    """Tokens behind which nothing can follow."""
    doubt: float = 1.0
    """How likely the rest is wrong, of what its model's probability of a token leaves to others."""
    token_ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)

    @property
    def target_position(self) -> int:
        """Where the target will draw the next token, which says with what noise: tokens that it alone has count too."""
        return len(self.sequence.token_ids) + len(self.token_ids)

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow: it is as long as it may be, or ends the sequence."""
        return len(self.token_ids) >= self.depth or not self.stop_ids.isdisjoint(self.token_ids[-1:])

    def append(self, token_id: int, confidence: float) -> None:
        """Take the next token."""
        self.token_ids.append(token_id)
        self.confidences.append(confidence)

    def as_drafted(self) -> DraftTokens:
        """What there is of it, in its own tokens, with the chances of each to be right."""
        confidences = 1 - self.doubt * (1 - np.array(self.confidences, np.float32))
        return DraftTokens(self.source, np.array(self.token_ids, np.int32), confidences.astype(np.float32))
