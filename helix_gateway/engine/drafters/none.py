"""The drafter of depth 0: it proposes nothing, so that plain decoding is the same step as any other."""

from collections.abc import Sequence as Ordered

from helix_gateway.engine.drafters.base import DraftTokens
from helix_gateway.engine.sequence import Sequence


class NoDrafter:
    """Proposes nothing, for any sequence."""

    name = "none"

    def propose(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> DraftTokens:
        """Empty proposals."""
        return DraftTokens([[] for _ in sequences])
