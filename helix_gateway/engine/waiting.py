"""Sequences that wait for their turn, in order of rank.

Knows nothing about why they wait or when their turn comes.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from helix_gateway.engine.sequence import Sequence


class WaitingQueue:
    """A sorted queue; a preempted sequence, having kept its rank, comes back before later arrivals."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Put it where its rank belongs."""
        insort(self._sequences, sequence, key=_rank)

    def head(self) -> Sequence:
        """Whose turn is next.  Raises IndexError when nobody waits."""
        return self._sequences[0]

    def remove(self, sequence: Sequence) -> None:
        """Take it out; it must be in."""
        at = bisect_left(self._sequences, _rank(sequence), key=_rank)
        del self._sequences[at]


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
