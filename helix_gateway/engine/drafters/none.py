"""The drafter of depth 0: it proposes nothing, so that plain decoding is the same step as any other."""

from collections.abc import Sequence as Ordered

from helix_gateway.engine.drafters.base import NOTHING, DraftTokens
from helix_gateway.engine.sequence import Sequence


class NoDrafter:
    """Proposes nothing, for any sequence."""

    def propose(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[DraftTokens]:
        """Empty proposals."""
        return [NOTHING for _ in sequences]

    def retire(self, sequence: Sequence) -> None:
        """Nothing is kept of a sequence."""
