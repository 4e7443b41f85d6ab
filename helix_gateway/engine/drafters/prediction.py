"""What a client said the answer will be, followed token by token and found again after every divergence.

While the output goes along the prediction, the next tokens are simply read off.  Where it leaves it, the place to go on
is the one whose last tokens agree with most of the output's, of equals the nearest to where it was left: so lines that
were put in, left out or changed cost a few tokens each.  A bounded stretch around the place is looked through; what
moved farther is found through the prediction's suffix automaton.  Knows nothing about sequences.
"""

import numba
import numpy as np

from helix_gateway.core.inner_functions import INNER
from helix_gateway.engine.drafters.suffix_automaton import Float32s, Int32s, Match, SuffixAutomaton

_STRETCH = 1024
"""Tokens looked through to either side of where the prediction was left."""
_LONGEST_AGREEMENT = 16
"""More tokens that agree make no place more likely."""
_SHORTEST_AGREEMENT = 2


class Prediction:
    """One request's prediction beside one sequence's output.

    Args:
        token_ids: int32 [num_tokens].
    """

    def __init__(self, token_ids: Int32s) -> None:
        self._token_ids = token_ids
        self._automaton = SuffixAutomaton(len(token_ids))
        self._automaton.append(token_ids)
        self._match = Match()
        self._place = 0
        """Of the token that is expected next."""
        self._agreed = 1
        """Tokens in a row that came as expected; at the beginning one is taken for granted."""

    def read(self, output: Int32s, num_new: int) -> None:
        """Take the output's last ``num_new`` tokens; ``output``, int32, holds some tokens before them too."""
        self._match = self._automaton.read(self._match, output[len(output) - num_new :])
        self._place, self._agreed = _align(self._token_ids, output, num_new, self._place, self._agreed)

    def follow(self, token_ids: Int32s, confidences: Float32s) -> int:
        """Write what is expected next and how sure that is, as `SuffixAutomaton.follow` does."""
        if not self._agreed:
            if self._match.length < _SHORTEST_AGREEMENT:
                return 0
            return self._automaton.follow(self._match, token_ids, confidences)
        expected = self._token_ids[self._place : self._place + len(token_ids)]
        count = len(expected)
        token_ids[:count] = expected
        agreed = self._agreed + np.arange(count, dtype=np.float32)
        confidences[:count] = agreed / (agreed + 1)
        return count


@numba.njit(cache=True, **INNER)
def _agreement(token_ids, place, output, end):  # type: ignore[no-untyped-def]
    """How many tokens before ``place`` agree with those of the output before ``end``."""
    count = 0
    most = min(place, end, _LONGEST_AGREEMENT)
    while count < most and token_ids[place - 1 - count] == output[end - 1 - count]:
        count += 1
    return count


@numba.njit(cache=True, **INNER)
def _nearest(token_ids, output, end, left_at):  # type: ignore[no-untyped-def]
    """The place to go on at, and how many tokens before it agree; (left_at, 0) if there is none."""
    best, best_agreement = left_at, 0
    for distance in range(_STRETCH):
        # What was left out is likelier than what comes again, so ahead goes before behind.
        for place in (left_at + distance, left_at - distance):
            if 0 < place <= len(token_ids):
                agreement = _agreement(token_ids, place, output, end)
                if agreement > best_agreement:
                    best, best_agreement = place, agreement
        if best_agreement == _LONGEST_AGREEMENT:
            break
    if best_agreement < _SHORTEST_AGREEMENT:
        return left_at, 0
    return best, best_agreement


@numba.njit(cache=True)
def _align(token_ids, output, num_new, place, agreed):  # type: ignore[no-untyped-def]
    for end in range(len(output) - num_new + 1, len(output) + 1):
        if agreed and place < len(token_ids) and token_ids[place] == output[end - 1]:
            place, agreed = place + 1, agreed + 1
        else:
            place, agreed = _nearest(token_ids, output, end, place)
    return place, agreed
