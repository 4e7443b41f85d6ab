"""A token bucket, the measure of a rate: it fills evenly, and what is taken out is gone until then.

It may be overdrawn, since what a request costs in tokens is known only when it ends; then it has to fill up to zero
first.  Knows nothing about what is counted.
"""

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds that only ever grow."""


class Bucket:
    """Holds ``per_minute`` at most, and gets as many in a minute."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at_s = clock()

    @property
    def level(self) -> float:
        """What is in it now; below zero where it was overdrawn."""
        now_s = self._clock()
        self._level = min(self.per_minute, self._level + (now_s - self._at_s) * self.per_minute / 60)
        self._at_s = now_s
        return self._level

    @property
    def remaining(self) -> int:
        """Whole units that may be taken now."""
        return max(0, int(self.level))

    def take(self, amount: float) -> None:
        """Take out, whether it holds as much or not."""
        self._level = self.level - amount

    def wait_s(self, wanted: float) -> float:
        """Until it will hold ``wanted``; 0.0 where it does."""
        return max(0.0, (wanted - self.level) * 60 / self.per_minute)

    @property
    def reset_s(self) -> float:
        """Until it is full."""
        return self.wait_s(self.per_minute)
