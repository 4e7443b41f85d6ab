"""What the engine has written so far, as suffix automata: requests that are alike draft from each other's answers.

Stores of different cache salts never meet.  A store is bounded by two generations: answers go into the young one, and
when that is full it becomes the old one, and what was the old one is forgotten.  Knows nothing about drafts.
"""

from collections import OrderedDict

import numpy as np

from helix_gateway.engine.drafters.suffix_automaton import Int32s, SuffixAutomaton

STORE_TOKENS = 200_000
"""Of one salt: some 25 MB, since a token takes about 120 bytes."""
MOST_SALTS = 16
"""The one that was used least lately is forgotten first."""


class OutputStore:
    """The answers of one cache salt.

    Args:
        num_tokens: about how many are kept.
    """

    def __init__(self, num_tokens: int = STORE_TOKENS) -> None:
        self._generation_tokens = max(1, num_tokens // 2)
        self._young = SuffixAutomaton()
        self._old: SuffixAutomaton | None = None

    def add(self, token_ids: Int32s) -> None:
        """Remember one answer: int32 [num_tokens]."""
        if self._young.num_tokens + len(token_ids) > self._generation_tokens and self._young.num_tokens:
            self._old, self._young = self._young, SuffixAutomaton()
        self._young.begin_text()
        self._young.append(token_ids[-self._generation_tokens :])

    def generations(self) -> tuple[SuffixAutomaton, ...]:
        """What may be read, the newest first."""
        return (self._young,) if self._old is None else (self._young, self._old)


class OutputStores:
    """Stores by cache salt."""

    def __init__(self, num_tokens: int = STORE_TOKENS) -> None:
        self._num_tokens = num_tokens
        self._stores: OrderedDict[str, OutputStore] = OrderedDict()

    def generations(self, cache_salt: str) -> tuple[SuffixAutomaton, ...]:
        """What may be read of a salt's answers, the newest first; nothing where there are none."""
        store = self._stores.get(cache_salt)
        if store is None:
            return ()
        self._stores.move_to_end(cache_salt)
        return store.generations()

    def add(self, cache_salt: str, token_ids: list[int]) -> None:
        """Remember an answer."""
        if not token_ids:
            return
        self._stores.setdefault(cache_salt, OutputStore(self._num_tokens)).add(np.array(token_ids, np.int32))
        self._stores.move_to_end(cache_salt)
        if len(self._stores) > MOST_SALTS:
            self._stores.popitem(last=False)
