"""What the engine has written so far, as suffix automata: requests that are alike draft from each other's answers.

Stores of different cache salts never meet.  A store is bounded by two generations: answers go into the young one, and
when that is full it becomes the old one, and what was the old one is forgotten.  Knows nothing about drafts.
"""

from collections import OrderedDict, deque
from typing import NamedTuple

import numpy as np

from helix_gateway.engine.drafters.suffix_automaton import Int32s, SuffixAutomaton

STORE_TOKENS = 200_000
"""Of one salt: some 25 MB, since a token takes about 120 bytes."""
PIECE_TOKENS = 1024
_MOST_WAITING = 256
"""Pieces; who writes more than can be read does without what waits."""
MOST_SALTS = 16
"""The one that was used least lately is forgotten first."""


class OutputStore:
    """The answers of one cache salt.

    Args:
        num_tokens: about how many are kept.
    """

    def __init__(self, num_tokens: int = STORE_TOKENS) -> None:
        self._generation_tokens = max(1, num_tokens // 2)
        # Room for all at once: growing would hold a step up by milliseconds.
        self._young = SuffixAutomaton(self._generation_tokens)
        self._old: SuffixAutomaton | None = None

    def add(self, token_ids: Int32s, *, goes_on: bool = False) -> None:
        """Remember one answer, or how the last one goes on: int32 [num_tokens]."""
        if self._young.num_tokens + len(token_ids) > self._generation_tokens and self._young.num_tokens:
            self._old, self._young = self._young, SuffixAutomaton(self._generation_tokens)
        if not goes_on:
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
        self._waiting: deque[_Piece] = deque()

    def generations(self, cache_salt: str) -> tuple[SuffixAutomaton, ...]:
        """What may be read of a salt's answers, the newest first; nothing where there are none."""
        store = self._stores.get(cache_salt)
        if store is None:
            return ()
        self._stores.move_to_end(cache_salt)
        return store.generations()

    def add(self, cache_salt: str, token_ids: list[int]) -> None:
        """Remember an answer; a long one piece by piece, here and with each `read_some`."""
        for first in range(0, len(token_ids), PIECE_TOKENS):
            self._waiting.append(_Piece(cache_salt, token_ids[first : first + PIECE_TOKENS], first > 0))
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.clear()
        self.read_some()

    def read_some(self) -> None:
        """Take in the next piece that waits, if any: at most `PIECE_TOKENS` tokens, half a millisecond."""
        if not self._waiting:
            return
        salt, token_ids, goes_on = self._waiting.popleft()
        store = self._stores.get(salt) or OutputStore(self._num_tokens)
        self._stores[salt] = store
        store.add(np.array(token_ids, np.int32), goes_on=goes_on)
        self._stores.move_to_end(salt)
        if len(self._stores) > MOST_SALTS:
            self._stores.popitem(last=False)


class _Piece(NamedTuple):
    """Of an answer."""

    cache_salt: str
    token_ids: list[int]
    goes_on: bool
    """Whether it is not the answer's first."""
