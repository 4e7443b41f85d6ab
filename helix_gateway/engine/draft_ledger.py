"""What came of drafts, drafter by drafter, since the engine began.

Counts what verification kept; knows nothing about how drafts are made or how deep they should be.
"""

from dataclasses import dataclass, field

from helix_gateway.core.stats import DraftCounts
from helix_gateway.engine.plan import SequenceOutput


@dataclass(slots=True)
class _Account:
    num_drafts: int = 0
    num_draft_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    def add(self, drafted: int, accepted: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += drafted
        self.accepted_per_position += [0] * (accepted - len(self.accepted_per_position))
        for position in range(accepted):
            self.accepted_per_position[position] += 1

    def counts(self) -> DraftCounts:
        return DraftCounts(
            num_drafts=self.num_drafts,
            num_draft_tokens=self.num_draft_tokens,
            # A draft token is accepted in one place.
            num_accepted_tokens=sum(self.accepted_per_position),
            accepted_per_position=list(self.accepted_per_position),
        )


class DraftLedger:
    """One account a drafter, opened with its first draft."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def count(self, source: str, output: SequenceOutput) -> None:
        """Take one verified draft's outcome."""
        account = self._accounts.setdefault(source, _Account())
        account.add(output.num_draft_tokens, len(output.token_ids) - 1)

    def counts(self) -> dict[str, DraftCounts]:
        """All accounts as they stand."""
        return {drafter: account.counts() for drafter, account in self._accounts.items()}
