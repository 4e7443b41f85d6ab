"""What came of drafts, drafter by drafter, and how deep windows were: of an engine, or of one sequence.

Counts what verification kept; knows nothing about how drafts are made or how deep they should be.
"""

from dataclasses import dataclass, field
from itertools import accumulate

from helix_gateway.core.stats import DraftCounts


@dataclass(slots=True)
class _Account:
    num_draft_tokens: int = 0
    by_accepted: list[int] = field(default_factory=list)
    """How many drafts had so many tokens accepted, from 0 on."""

    def counts(self) -> DraftCounts:
        # A draft of which n tokens were accepted had one accepted at each of the first n places.
        at_least = list(accumulate(reversed(self.by_accepted)))[::-1]
        return DraftCounts(
            num_drafts=at_least[0],
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=sum(at_least[1:]),
            accepted_per_position=at_least[1:],
        )


class DraftLedger:
    """One account a drafter, opened with its first draft."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._depths: list[int] = []

    def count(self, source: str | None, drafted: int, accepted: int) -> None:
        """Take one window's outcome.

        Args:
            source: who drafted for it; None where nobody did.
            drafted, accepted: tokens.
        """
        _count_at(self._depths, drafted)
        if source is None:
            return
        account = self._accounts.get(source)
        if account is None:
            account = self._accounts[source] = _Account()
        account.num_draft_tokens += drafted
        _count_at(account.by_accepted, accepted)

    def counts(self) -> dict[str, DraftCounts]:
        """All accounts as they stand."""
        return {drafter: account.counts() for drafter, account in self._accounts.items()}

    def depths(self) -> list[int]:
        """How many windows had so many draft tokens, from 0 on."""
        return list(self._depths)


def _count_at(counts: list[int], place: int) -> None:
    if place >= len(counts):
        counts += [0] * (place + 1 - len(counts))
    counts[place] += 1
