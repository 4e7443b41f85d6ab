"""Drafts from text that is known already: this sequence's own, the request's prediction, earlier answers.

Prompt lookup is its simplest case.  A source finds the longest end of the sequence that it has seen before and says how
that went on, with a share for each token (`suffix_automaton.py`), or goes along prompt or prediction as the answer does
(`followed_text.py`); for each sequence the source whose draft is expected to be accepted farthest is taken.  No model
runs.  Catching up with tokens that came since is done when a draft is wanted, so a sequence that is never drafted for
costs nothing.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import partial

import numpy as np

from helix_gateway.core.event import FinishReason
from helix_gateway.engine.drafters import followed_text
from helix_gateway.engine.drafters.base import NOTHING, DraftTokens
from helix_gateway.engine.drafters.followed_text import FollowedText
from helix_gateway.engine.drafters.output_store import STORE_TOKENS, OutputStores
from helix_gateway.engine.drafters.suffix_automaton import Float32s, Int32s, Match, SuffixAutomaton
from helix_gateway.engine.sequence import PREDICTION, Sequence, SequenceKey

_LOOKED_BACK = 64
"""Tokens from which a reader finds its place in a text that it has not read before."""
_INDEXED = 16_384
"""Tokens of a prompt that are drafted from, its last: a token takes some 240 bytes."""
_INDEXED_AT_ONCE = 1024
"""Tokens that are added to sequences' own indexes at a step, all together: half a millisecond (docs/log.md)."""
_INDEXED_ALWAYS = 32
"""The same for each of them, however many there are: who lacks no more than its newest tokens waits for nobody's prompt."""
COPY = "copy"
"""What drafts off the prompt are counted under where the answer goes along it."""
_FOLLOWED = 4096
"""Tokens of a prompt that answers are looked for in, its last: finding places in it takes 0.4 ms to prepare."""
_LEARNED_FROM: tuple[FinishReason, ...] = ("stop", "length")


class SuffixDrafter:
    """`engine.drafters.base.Drafter` over suffix automata.

    Args:
        store_tokens: earlier answers remembered for each cache salt; 0 for none.
    """

    def __init__(self, *, store_tokens: int = STORE_TOKENS) -> None:
        self._stores = OutputStores(store_tokens) if store_tokens else None
        self._readers: dict[SequenceKey, _Reader] = {}

    def propose(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[DraftTokens]:
        """See `Drafter`."""
        if self._stores:
            self._stores.read_some()
        drafts, room = [], _INDEXED_AT_ONCE
        for sequence, depth in zip(sequences, depths, strict=True):
            reader = self._reader(sequence)
            store = self._stores.generations(sequence.request.cache_salt) if self._stores else ()
            room -= reader.catch_up(sequence, store, room)
            drafts.append(reader.best_draft(depth))
        return drafts

    def _reader(self, sequence: Sequence) -> "_Reader":
        reader = self._readers.get(sequence.key)
        if reader is None:
            reader = self._readers[sequence.key] = _Reader(sequence)
        return reader

    def retire(self, sequence: Sequence) -> None:
        """See `Drafter`; an answer that came to its end may help later ones."""
        self._readers.pop(sequence.key, None)
        if self._stores and sequence.finish_reason in _LEARNED_FROM:
            output = sequence.token_ids[sequence.num_prompt_tokens :]
            self._stores.add(sequence.request.cache_salt, output)


@dataclass(slots=True)
class _Place:
    """Where a reader stands in one generation of a store."""

    automaton: SuffixAutomaton
    match: Match


class _Reader:
    """One sequence beside all sources."""

    def __init__(self, sequence: Sequence) -> None:
        self.own = SuffixAutomaton()
        self.followed: dict[str, FollowedText] = {}
        """By source; its prompt once that is indexed."""
        prediction = np.array(sequence.request.prediction_token_ids, np.int32)
        if len(prediction):
            self.followed[PREDICTION] = FollowedText(prediction, followed_text.PREDICTION)
        self.places: list[_Place] = []
        self.num_read = 0
        self.num_indexed = 0
        """Tokens that ``own`` has taken, or will never take; fewer than were read while a long prompt is being indexed."""
        self._seen = Match()
        """The longest end of the sequence that stands in it twice."""

    def catch_up(self, sequence: Sequence, store: Ordered[SuffixAutomaton], room: int) -> int:
        """Read the tokens that have come since the last time; how many were indexed, about ``room`` at most."""
        new = sequence.token_ids[self.num_read :]
        new_ids = np.array(new[-_INDEXED:], np.int32)
        num_new = self._index(sequence.token_ids, new_ids, room)
        self._follow_texts(sequence)
        self.num_read += len(new)
        if store or self.places:
            self._read_store(sequence, store, new_ids)
        return num_new

    def _read_store(self, sequence: Sequence, store: Ordered[SuffixAutomaton], new_ids: Int32s) -> None:
        known = {place.automaton: place.match for place in self.places}
        places, self.places = [], []  # whatever fails below: what was not read to its end is found anew
        for automaton in store:
            match, unread = known.get(automaton), new_ids
            if match is None:
                match, unread = Match(), np.array(sequence.token_ids[-_LOOKED_BACK:], np.int32)
            places.append(_Place(automaton, automaton.read(match, unread)))
        self.places = places

    def _index(self, token_ids: list[int], new_ids: Int32s, room: int) -> int:
        """Index what comes next, where the ids ``new_ids`` are the last ones; how many."""
        if not self.num_indexed:
            self.num_indexed = max(0, len(token_ids) - _INDEXED)
        first, most = self.num_indexed, max(_INDEXED_ALWAYS, room)
        lacks_the_new_alone = len(token_ids) - first == len(new_ids) and len(new_ids) <= most
        # Making an array of a list is a tenth of what proposing takes.
        piece = new_ids if lacks_the_new_alone else np.array(token_ids[first : first + most], np.int32)
        self._seen = self.own.append(piece)
        self.num_indexed += len(piece)
        return len(piece)

    def _follow_texts(self, sequence: Sequence) -> None:
        num_prompt = sequence.num_prompt_tokens
        if COPY not in self.followed and self.num_indexed >= num_prompt:
            prompt = np.array(sequence.token_ids[max(0, num_prompt - _FOLLOWED) : num_prompt], np.int32)
            self.followed[COPY] = FollowedText(prompt, followed_text.PROMPT)
        for text in self.followed.values():
            text.num_read = max(text.num_read, len(sequence.token_ids) - num_prompt - _INDEXED_AT_ONCE)
            unread = sequence.token_ids[num_prompt + text.num_read :]
            if unread:
                text.read(np.array(unread, np.int32))

    def best_draft(self, depth: int) -> DraftTokens:
        """Of all sources' drafts the one of which most tokens are expected to be accepted."""
        # Where the index ends before the sequence does, what follows there does not follow here.
        indexed = self.num_indexed == self.num_read
        drafts = [_written("suffix", self.own, self._seen, depth) if indexed else NOTHING]
        drafts += [_written("store", place.automaton, place.match, depth) for place in self.places]
        drafts += [
            _drafted(source, text.follow, depth) for source, text in self.followed.items() if text.says_something
        ]
        return drafts[0] if len(drafts) == 1 else max(drafts, key=_expected_tokens)


def _written(source: str, automaton: SuffixAutomaton, match: Match, depth: int) -> DraftTokens:
    if not match.length:  # nothing that was seen before, so nothing follows
        return DraftTokens(source, NOTHING.token_ids, NOTHING.confidences)
    return _drafted(source, partial(automaton.follow, match), depth)


def _drafted(source: str, follow: Callable[[Int32s, Float32s], int], depth: int) -> DraftTokens:
    token_ids, confidences = np.empty(depth, np.int32), np.empty(depth, np.float32)
    count = follow(token_ids, confidences)
    return DraftTokens(source, token_ids[:count], confidences[:count])


def _expected_tokens(draft: DraftTokens) -> float:
    # Plain floats: a draft is short, and two calls of numpy take longer than thirty products.
    expected, chance = 0.0, 1.0
    for confidence in draft.confidences.tolist():
        chance *= confidence
        expected += chance
    return expected
