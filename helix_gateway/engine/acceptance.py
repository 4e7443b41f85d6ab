"""How likely draft tokens are to be accepted, learned from what became of earlier ones.

A drafter's confidence is only its own opinion.  For each source of drafts a straight line is fitted through what it was
confident of and what was right, which tells soon whether confidence means anything; then the share really accepted is
counted by confidence and by place in the window (older counts fade), and for each sequence how the source did against
what was expected of it.  By place alone it is counted too: all that can be said before anything is drafted.  Drafts
that were not verified teach too: the token sampled where verification ended shows whether the next one would have been
right, so nothing has to be tried only to learn.  Compiled, since it runs at every step.  Knows nothing about costs.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from helix_gateway.core.inner_functions import INNER
from helix_gateway.core.step import Int32s
from helix_gateway.engine.drafters.base import DraftTokens

Float64s = npt.NDArray[np.float64]

_CONFIDENCES = 12
"""Cells for confidence, as many for the upper half as for the lower."""
_PLACES = 4
"""Cells for the place in the window: the first, the next two, the next four, the rest."""
_PRIOR = 6.0
"""Observations that what is believed of a confidence counts for."""
_SOURCE_PRIOR = 2.0
"""Observations that it counts for, on average over a source, that the drafter says how often it is right, and a little
less than it is."""
_HOPE = 0.6
"""How much more often it is believed to be right where it is in doubt, until it is known: what is not tried teaches
little."""
_FIRST_TOKENS = 8.0
"""Observations of a source after which its own tokens tell what to believe (`benchmarks/depth_policy.py`, as all of
these)."""
_SLOPE_PRIOR = 0.4
"""Squared differences of confidence that it counts for that the drafter knows when it is right."""
_MEMORY = 300.0
"""Observations after which an older one has faded to a third."""
_SEQUENCE_PRIOR = 12.0
_SEQUENCE_MEMORY = 48.0
_KEPT_OF_SEQUENCE = np.exp(-1.0 / _SEQUENCE_MEMORY)
_MOST = 0.995
_COUNT, _CONFIDENCE, _RIGHT, _CONFIDENCE_SQUARED, _BOTH, _LATER = range(6)
_SUMS = 6
"""Of a source, over its tokens, fading: ones, confidences, rights, their products; and ones behind a window's first."""
_FIRST_REACH = 16.0
"""Of a sequence that is new: generous, since a long draft that is right is worth most."""
_REACH_RATE = 0.2
_UNTRIED = 0.75
"""Share of a source's tokens believed to be accepted before any was drafted: enough to be tried where that could
pay."""
_UNTRIED_OF = {"self": 0.92}
"""The same of sources of which more is known: SmolLM2's own weights at four bits were right for 95 of 100
(docs/log.md)."""
_UNTRIED_PRIOR = 6.0
_PLACE_MEMORY = 100.0


@dataclass(slots=True)
class _Record:
    """What one sequence's drafts brought, and what had been expected of them."""

    accepted: float = 0.0
    expected: float = 0.0
    reach: float = _FIRST_REACH
    """How many tokens of a proposal are right before the first wrong one, on a fading average."""

    @property
    def factor(self) -> float:
        return (self.accepted + _SEQUENCE_PRIOR) / (self.expected + _SEQUENCE_PRIOR)


class AcceptanceModel:
    """Probabilities for draft tokens, by source and by sequence."""

    def __init__(self) -> None:
        self._sources: dict[str, int] = {}
        self._accepted = np.empty((0, _CONFIDENCES, _PLACES))
        self._seen = np.empty((0, _CONFIDENCES, _PLACES))
        self._sums = np.empty((0, _SUMS))
        self._placed_accepted = np.empty((0, _PLACES))
        self._placed_seen = np.empty((0, _PLACES))
        self._num_told: list[int] = []
        """By source, how often it was ever seen how far its drafts go: at a token behind the first, or as the first was
        wrong."""
        self._records: dict[Hashable, dict[str, _Record]] = {}

    def probabilities(self, keys: Sequence[Hashable], drafts: Sequence[DraftTokens]) -> Float64s:
        """[num_drafts, longest draft]: that the token is accepted and all before it are; 0 behind a draft's end."""
        lengths = np.array([len(draft.token_ids) for draft in drafts], np.int64)
        confidences = np.zeros((len(drafts), int(lengths.max(initial=0))), np.float32)
        for row, draft in zip(confidences, drafts, strict=True):
            row[: len(draft.confidences)] = draft.confidences
        sources = np.array([self._source(draft.source) for draft in drafts], np.int64)
        factors = np.array([self._factor(key, draft.source) for key, draft in zip(keys, drafts, strict=True)])
        return np.asarray(_chained(self._accepted, self._seen, self._sums, sources, factors, lengths, confidences))

    def foreseen(self, source: str, keys: Sequence[Hashable], depth: int) -> Float64s:
        """As `probabilities`, [len(keys), depth], of what a source has yet to draft."""
        number = self._source(source)
        shares = self._placed_accepted[number] / self._placed_seen[number]
        columns = [_column(place) for place in range(depth)]
        factors = np.array([self._factor(key, source) for key in keys])
        chances = np.minimum(_MOST, shares[columns][None, :] * factors[:, None])
        return np.multiply.accumulate(chances, axis=1)

    def is_known(self, source: str) -> bool:
        """Whether anything is known of how far a source's drafts go: first tokens that are right do not tell it."""
        return self._num_told[self._source(source)] >= _FIRST_TOKENS

    def fade(self, source: str, share: float) -> None:
        """Forget a share of how a source's tokens fared by place: who is never asked has to be tried again some day."""
        number = self._source(source)
        untried = _UNTRIED_OF.get(source, _UNTRIED) * _UNTRIED_PRIOR
        for counts, prior in ((self._placed_accepted, untried), (self._placed_seen, _UNTRIED_PRIOR)):
            counts[number] += share * (prior - counts[number])

    def _factor(self, key: Hashable, source: str) -> float:
        record = self._records.get(key, {}).get(source)
        return 1.0 if record is None else record.factor

    def learn(self, key: Hashable, draft: DraftTokens, choices: Int32s) -> None:
        """Take what the target chose where the draft stood.

        Args:
            draft: as it was proposed, tokens that were not verified included.
            choices: the tokens that the sequence got, at least one.
        """
        record = self._records.setdefault(key, {}).setdefault(draft.source, _Record())
        source = self._source(draft.source)
        told = min(len(choices), len(draft.token_ids))
        cells = (self._accepted[source], self._seen[source], self._sums[source])
        places = (self._placed_accepted[source], self._placed_seen[source])
        accepted, expected = _learn(*cells, *places, draft.token_ids[:told], draft.confidences[:told], choices[:told])
        self._num_told[source] += min(int(accepted) + 1, told) - 1 if accepted else 1
        kept = _KEPT_OF_SEQUENCE**told
        record.accepted = record.accepted * kept + accepted
        record.expected = record.expected * kept + expected
        # How far one that was right to its end would have gone on, nobody knows.
        reached = 2 * accepted if accepted == len(draft.token_ids) else accepted
        record.reach += _REACH_RATE * (reached - record.reach)

    def reach(self, key: Hashable) -> float:
        """How many tokens of a sequence's proposals were right lately, of the source that reaches farthest."""
        return max((record.reach for record in self._records.get(key, {}).values()), default=_FIRST_REACH)

    def forget(self, key: Hashable) -> None:
        """A sequence has ended."""
        self._records.pop(key, None)

    def _source(self, name: str) -> int:
        number = self._sources.get(name)
        if number is None:
            number = self._sources[name] = len(self._sources)
            cells = np.zeros((1, _CONFIDENCES, _PLACES))
            self._accepted = np.concatenate([self._accepted, cells])
            self._seen = np.concatenate([self._seen, cells])
            self._sums = np.concatenate([self._sums, np.zeros((1, _SUMS))])
            untried = np.full((1, _PLACES), _UNTRIED_PRIOR)
            self._placed_accepted = np.concatenate([self._placed_accepted, _UNTRIED_OF.get(name, _UNTRIED) * untried])
            self._placed_seen = np.concatenate([self._placed_seen, untried])
            self._num_told.append(0)
        return number


@numba.njit(cache=True)
def _column(place):  # type: ignore[no-untyped-def]
    return 0 if place == 0 else (1 if place < 3 else (2 if place < 7 else 3))


@numba.njit(cache=True, **INNER)
def _cell(confidence, place):  # type: ignore[no-untyped-def]
    """Finer near certainty, where a little makes a long draft."""
    scale = 1.0 - np.sqrt(max(0.0, 1.0 - confidence))
    return min(_CONFIDENCES - 1, int(scale * _CONFIDENCES)), _column(place)


@numba.njit(cache=True, **INNER)
def _count_places(accepted, seen, num_right, num_told):  # type: ignore[no-untyped-def]
    """Count the right tokens of a draft, and the one that was wrong if there was one."""
    fade = np.exp(-1.0 / _PLACE_MEMORY)
    for place in range(min(num_right + 1, num_told)):
        column = _column(place)
        accepted[column] = accepted[column] * fade + (1.0 if place < num_right else 0.0)
        seen[column] = seen[column] * fade + 1.0


@numba.njit(cache=True, **INNER)
def _line(sums):  # type: ignore[no-untyped-def]
    """What is believed of a source's confidence: (at 0, more for each unit of it)."""
    count = max(1e-9, sums[_COUNT])
    mean = sums[_CONFIDENCE] / count
    right = (sums[_RIGHT] + _SOURCE_PRIOR * (mean + _HOPE * mean * (1.0 - mean))) / (count + _SOURCE_PRIOR)
    spread = max(0.0, sums[_CONFIDENCE_SQUARED] - count * mean * mean)
    slope = (sums[_BOTH] - mean * sums[_RIGHT] + _SLOPE_PRIOR) / (spread + _SLOPE_PRIOR)
    slope = min(1.0, max(0.0, slope))
    if count > _FIRST_TOKENS:
        # That first tokens are right more often than was said tells nothing of later ones; that they are wrong does.
        later = sums[_LATER] / (sums[_LATER] + _SOURCE_PRIOR)
        right = min(right, mean) + later * max(0.0, right - mean)
    return right - slope * mean, slope


@numba.njit(cache=True)
def _chance(accepted, seen, line, confidence, place):  # type: ignore[no-untyped-def]
    row, column = _cell(confidence, place)
    believed = min(1.0, max(0.0, line[0] + line[1] * confidence))
    return (accepted[row, column] + _PRIOR * believed) / (seen[row, column] + _PRIOR)


@numba.njit(cache=True)
def _chained(accepted, seen, sums, sources, factors, lengths, confidences):  # type: ignore[no-untyped-def]
    chained = np.zeros(confidences.shape)
    for draft in range(len(lengths)):
        reached, source = 1.0, sources[draft]
        line = _line(sums[source])
        for place in range(lengths[draft]):
            chance = _chance(accepted[source], seen[source], line, confidences[draft, place], place)
            reached *= min(_MOST, chance * factors[draft])
            chained[draft, place] = reached
    return chained


@numba.njit(cache=True)
def _learn(accepted, seen, sums, placed_accepted, placed_seen, token_ids, confidences, choices):  # type: ignore[no-untyped-def]
    """Count draft tokens [num_told] by confidence and by place; how many were right, and how many were expected to be."""
    right = 0.0
    expected = 0.0
    fade = np.exp(-1.0 / _MEMORY)
    line = _line(sums)
    for place in range(len(token_ids)):
        confidence = confidences[place]
        row, column = _cell(confidence, place)
        agrees = 1.0 if choices[place] == token_ids[place] else 0.0
        expected += min(_MOST, _chance(accepted, seen, line, confidence, place))
        accepted[row, column] = accepted[row, column] * fade + agrees
        seen[row, column] = seen[row, column] * fade + 1.0
        sums *= fade
        sums[_COUNT] += 1.0
        sums[_CONFIDENCE] += confidence
        sums[_RIGHT] += agrees
        sums[_CONFIDENCE_SQUARED] += confidence * confidence
        sums[_BOTH] += confidence * agrees
        sums[_LATER] += place > 0
        right += agrees
        if not agrees:
            break
    _count_places(placed_accepted, placed_seen, int(right), len(token_ids))
    return right, expected
