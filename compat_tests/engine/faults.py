"""Makes the k-th call of whatever may fail fail, for every k in turn, as SQLite's tests do with every allocation.

Knows nothing about what a fault should lead to.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Faults:
    """Counts calls of all sites, and raises at the ``at``-th (and at each later one, where ``lasting``); 0: never."""

    at: int
    make_error: Callable[[], Exception] = AssertionError
    lasting: bool = False
    calls: int = 0
    raised: list[str] = field(default_factory=list)
    sites: set[str] = field(default_factory=set)
    watcher: Callable[[], None] = lambda: None
    """Told just before a fault."""

    def guard(self, owner, *names):
        """Let methods of an object be sites."""
        for name in names:
            setattr(owner, name, self._guarded(getattr(owner, name), f"{type(owner).__name__}.{name}"))

    def disarm(self):
        """Raise no more."""
        self.at, self.lasting = 0, False

    def _guarded(self, method, site):
        @functools.wraps(method)
        def call(*arguments, **named):
            self.calls += 1
            self.sites.add(site)
            if self.calls == self.at or (self.lasting and self.calls > self.at):
                self.raised.append(site)
                self.watcher()
                raise self.make_error()
            return method(*arguments, **named)

        return call


def every_fault(make_error, *, lasting=False):
    """Faults ever later, until a run meets none."""
    for at in itertools.count(1):
        faults = Faults(at, make_error, lasting)
        yield faults
        if not faults.raised:
            return
