"""What came of drafts, drafter by drafter, and how deep windows were: of an engine, or of one sequence.

Counts what verification kept; knows nothing about how drafts are made or how deep they should be.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate

from helix_gateway.core.stats import DraftCounts


@dataclass(slots=True)
class _Account:
    num_draft_tokens: int = 0
    by_accepted: Counter[int] = field(default_factory=Counter)
    """How many drafts had so many tokens accepted."""

    def counts(self) -> DraftCounts:
        # A draft of which n tokens were accepted had one accepted at each of the first n places.
        at_least = list(accumulate(reversed(_listed(self.by_accepted))))[::-1]
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
        self._depths: Counter[int] = Counter()

    def count(self, source: str | None, drafted: int, accepted: int) -> None:
        """Take one window's outcome.

        Args:
            source: who drafted for it; None where nobody did.
            drafted, accepted: tokens.
        """
        self._depths[drafted] += 1
        if source is None:
            return
        account = self._accounts.get(source)
        if account is None:
            account = self._accounts[source] = _Account()
        account.num_draft_tokens += drafted
        account.by_accepted[accepted] += 1

    def counts(self) -> dict[str, DraftCounts]:
        """All accounts as they stand."""
        return {drafter: account.counts() for drafter, account in self._accounts.items()}

    def depths(self) -> list[int]:
        """How many windows had so many draft tokens, from 0 on."""
        return _listed(self._depths)


def _listed(counts: Counter[int]) -> list[int]:
    """The counts of 0, 1, … up to the largest that was counted."""
    return [counts[number] for number in range(1 + max(counts, default=-1))]
