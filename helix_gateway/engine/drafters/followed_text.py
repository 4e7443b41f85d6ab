"""A known text that an answer goes along, followed token by token and found again after every divergence.

It is what a client said the answer will be, or a prompt that is being written again with changes.  While the output
goes along it, the next tokens are simply read off.  Where it leaves it, one token of the text is believed to be
replaced, until the token behind it comes; unless some last tokens of the output are found in the text, which then goes
on behind those, of equals the nearest to where it was left: so lines that were put in, left out or changed cost a few
tokens each.  What was replaced by what is remembered, and expected wherever the same tokens come again, so a name that is
changed throughout costs its first occurrences only (docs/decisions/0016).  Knows nothing about sequences.
"""

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from helix_gateway.core.inner_functions import INNER
from helix_gateway.core.sorted_search import first_from
from helix_gateway.engine.drafters.suffix_automaton import Float32s, Int32s

_LONGEST_AGREEMENT = 16
"""More tokens that agree make no place more likely."""
_MOST_PLACES = 64
"""Places that are compared to either side of where the text was left, of those whose last two tokens agree."""
_REMEMBERED = 8
"""Replacements, the newest."""
_LONGEST_REPLACEMENT = 4
"""Tokens, of either side of one."""
_AGREED_ENOUGH = 2
"""Tokens after a replacement by which it is known to be one."""
_LESS_TRUST = 4
"""What is left of the tokens that agreed is divided by this wherever the output leaves the text."""
_RECENT = 32
"""Tokens of the output that are looked back at."""

# A reader's place in the text, in an array of int64: the token expected next and how many of the output agreed in a row,
# from which place on; how much of a replacement has been read, and which; where the text was left (or nothing), and
# tokens of the output since; where the next replacement is kept; and for how many tokens the output went along, of
# which divergences take away.
_NEXT, _AGREED, _BEGAN_AT, _INSIDE, _REPLACEMENT, _LEFT_AT, _NUM_SINCE, _KEPT_AT, _TRUST = range(9)
_FIELDS = 9
# Columns of a replacement: how many tokens (0: there is none) are replaced by how many; which, and by which.
_NUM_OLD, _NUM_NEW, _OLD = range(3)
_NEW = _OLD + _LONGEST_REPLACEMENT
_NOTHING = -1


class Belief(NamedTuple):
    """How much is believed of a text."""

    is_said: bool
    """Whether somebody said that the output is this text: then its first token is expected first, and it always counts.
    Otherwise only where it says more than a `SuffixAutomaton` does, which tells what followed the same tokens before:
    where a replacement lies ahead, and behind one until as many tokens agree as a place is found by."""
    shortest_agreement: int
    """Tokens of the output that must be found in the text to go on there; 2 or more."""
    trusted: int
    """Tokens that must have agreed, as far as divergences have left them, before anything is expected."""


PREDICTION = Belief(is_said=True, shortest_agreement=2, trusted=0)
PROMPT = Belief(is_said=False, shortest_agreement=3, trusted=4)


class FollowedText:
    """One text beside one sequence's output.

    Args:
        token_ids: int32 [num_tokens].
        belief: what is known of it.
    """

    def __init__(self, token_ids: Int32s, belief: Belief) -> None:
        self._token_ids = token_ids
        self._pairs, self._places = _pairs_of(token_ids)
        self._belief = belief
        self._reader = np.zeros(_FIELDS, np.int64)
        self._reader[[_REPLACEMENT, _LEFT_AT]] = _NOTHING
        self._reader[_AGREED] = belief.is_said  # one token is taken for granted
        self._replacements = np.zeros((_REMEMBERED, _NEW + _LONGEST_REPLACEMENT), np.int32)
        self._recent = np.full(_RECENT, _NOTHING, np.int32)
        """The output's last tokens, the newest last."""
        self.num_read = 0
        """Tokens of the output, those that were passed over included; whoever reads it may count some as read."""
        self.says_something = belief.is_said
        """Whether `follow` may write anything."""

    def read(self, token_ids: Int32s) -> None:
        """Take the output's next tokens, int32."""
        text = (self._token_ids, self._pairs, self._places)
        output = (self._recent, token_ids)
        self.says_something = bool(_read(*text, self._replacements, self._reader, *output, *self._belief))
        self.num_read += len(token_ids)

    def follow(self, token_ids: Int32s, confidences: Float32s) -> int:
        """Write what is expected next and how sure that is, as `SuffixAutomaton.follow` does."""
        if not self.says_something:
            return 0
        ahead = (self._reader.copy(), token_ids, confidences)
        return int(_follow(self._token_ids, self._replacements, *ahead, *self._belief[:2]))


def _pairs_of(token_ids: Int32s) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each two tokens in a row as a number, sorted, and the places behind them, of equals the first first."""
    pairs = (token_ids[:-1].astype(np.int64) << 32) | token_ids[1:]
    order = np.argsort(pairs, kind="stable")
    return pairs[order], order + 2


@numba.njit(cache=True, **INNER)
def _agreement(token_ids, place, recent):  # type: ignore[no-untyped-def]
    """How many tokens before ``place`` are the output's last."""
    count = 0
    most = min(place, _LONGEST_AGREEMENT)
    while count < most and token_ids[place - 1 - count] == recent[_RECENT - 1 - count]:
        count += 1
    return count


@numba.njit(cache=True, **INNER)
def _found(token_ids, pairs, places, recent, left_at, shortest_agreement):  # type: ignore[no-untyped-def]
    """The place to go on at, and how many tokens before it agree; (left_at, 0) if there is none."""
    best, best_agreement = left_at, 0
    pair = (np.int64(recent[_RECENT - 2]) << 32) | recent[_RECENT - 1]
    first = first_from(pairs, pair, 0, len(pairs))
    behind = first_from(pairs, pair + 1, first, len(pairs))
    middle = first_from(places, left_at, first, behind)
    for number in range(max(first, middle - _MOST_PLACES), min(behind, middle + _MOST_PLACES)):
        place = places[number]
        agreement = _agreement(token_ids, place, recent)
        # What was left out is likelier than what comes again, so of two as near the one ahead.
        if agreement > best_agreement or (agreement == best_agreement and abs(place - left_at) <= abs(best - left_at)):
            best, best_agreement = place, agreement
    if best_agreement < shortest_agreement:
        return left_at, 0
    return best, best_agreement


@numba.njit(cache=True, **INNER)
def _is_of(token_ids, replacements, number, place):  # type: ignore[no-untyped-def]
    """Whether a replacement is of the tokens at ``place``, all of which there are."""
    for index in range(replacements[number, _NUM_OLD]):
        if token_ids[place + index] != replacements[number, _OLD + index]:
            return False
    return True


@numba.njit(cache=True, **INNER)
def _replacement_at(token_ids, replacements, place):  # type: ignore[no-untyped-def]
    """Which replacement is of the tokens at ``place``, the one of most; or nothing."""
    found, most = _NOTHING, 0
    for number in range(_REMEMBERED):
        count = replacements[number, _NUM_OLD]
        if count > most and place + count <= len(token_ids) and _is_of(token_ids, replacements, number, place):
            found, most = number, count
    return found


@numba.njit(cache=True, **INNER)
def _expected(token_ids, replacements, reader):  # type: ignore[no-untyped-def]
    """The token that comes next if the output goes along the text; nothing where the text ends."""
    if reader[_NEXT] >= len(token_ids):
        reader[_REPLACEMENT] = _NOTHING
        return _NOTHING
    if not reader[_INSIDE]:
        reader[_REPLACEMENT] = _replacement_at(token_ids, replacements, reader[_NEXT])
    if reader[_REPLACEMENT] == _NOTHING:
        return token_ids[reader[_NEXT]]
    return replacements[reader[_REPLACEMENT], _NEW + reader[_INSIDE]]


@numba.njit(cache=True, **INNER)
def _go_on(replacements, reader):  # type: ignore[no-untyped-def]
    """Pass the token that was expected."""
    number = reader[_REPLACEMENT]
    if number == _NOTHING:
        reader[_NEXT] += 1
        return
    reader[_INSIDE] += 1
    if reader[_INSIDE] >= replacements[number, _NUM_NEW]:
        reader[_NEXT] += replacements[number, _NUM_OLD]
        reader[_INSIDE] = 0


@numba.njit(cache=True, **INNER)
def _is_expecting(reader):  # type: ignore[no-untyped-def]
    """Whether the output goes along the text, or has left it just now."""
    return reader[_AGREED] > 0 or (reader[_LEFT_AT] != _NOTHING and reader[_NUM_SINCE] <= _LONGEST_REPLACEMENT + 1)


@numba.njit(cache=True, **INNER)
def _is_unreplaced(token_ids, reader, token):  # type: ignore[no-untyped-def]
    """Whether a token is what stands in the text where a replacement was expected to begin."""
    if not reader[_AGREED] or reader[_REPLACEMENT] == _NOTHING or reader[_INSIDE]:
        return False
    return token_ids[reader[_NEXT]] == token


@numba.njit(cache=True, **INNER)
def _leave(replacements, reader):  # type: ignore[no-untyped-def]
    """The output is not what was expected: what came replaces one token of the text, until more is known."""
    if reader[_AGREED]:
        reader[_TRUST] //= _LESS_TRUST
        if reader[_REPLACEMENT] != _NOTHING:
            replacements[reader[_REPLACEMENT], _NUM_OLD] = 0
        reader[_LEFT_AT] = reader[_NEXT]
        reader[_NUM_SINCE] = 1 + reader[_INSIDE]
    if reader[_LEFT_AT] != _NOTHING:
        reader[_NEXT] = reader[_LEFT_AT] + 1
    reader[_AGREED] = reader[_INSIDE] = 0


@numba.njit(cache=True, **INNER)
def _agree(reader, began_at, agreed):  # type: ignore[no-untyped-def]
    """So many tokens more of the output agree with the text; where none did before, they begin at ``began_at``."""
    if not reader[_AGREED]:
        reader[_BEGAN_AT] = began_at
    reader[_AGREED] += agreed


@numba.njit(cache=True, **INNER)
def _remember(token_ids, replacements, reader, recent):  # type: ignore[no-untyped-def]
    """Keep what was replaced by what between where the text was left and where it went on."""
    left_at = reader[_LEFT_AT]
    reader[_LEFT_AT] = _NOTHING
    num_old = reader[_BEGAN_AT] - left_at
    num_new = reader[_NUM_SINCE] - reader[_AGREED]
    first = _RECENT - reader[_NUM_SINCE]
    if not (0 < num_old <= _LONGEST_REPLACEMENT and 0 < num_new <= _LONGEST_REPLACEMENT and first >= 0):
        return
    for number in range(_REMEMBERED):  # what replaced these tokens before does no more
        if replacements[number, _NUM_OLD] == num_old and _is_of(token_ids, replacements, number, left_at):
            replacements[number, _NUM_OLD] = 0
    number = reader[_KEPT_AT]
    reader[_KEPT_AT] = (number + 1) % _REMEMBERED
    replacements[number, _NUM_OLD] = num_old
    replacements[number, _NUM_NEW] = num_new
    for index in range(num_old):
        replacements[number, _OLD + index] = token_ids[left_at + index]
    for index in range(num_new):
        replacements[number, _NEW + index] = recent[first + index]


@numba.njit(cache=True, **INNER)
def _says_something(replacements, reader, is_said, shortest, trusted):  # type: ignore[no-untyped-def]
    """Whether anything is to be expected of the text that nobody else knows."""
    if not reader[_AGREED] or reader[_TRUST] < trusted:
        return False
    if is_said or reader[_AGREED] < shortest:
        return True
    num_known = 0
    for number in range(_REMEMBERED):
        num_known += replacements[number, _NUM_OLD] > 0
    return num_known > 0


@numba.njit(cache=True)
def _read(token_ids, pairs, places, replacements, reader, recent, output, is_said, shortest, trusted):  # type: ignore[no-untyped-def]
    """Take tokens of the output; whether anything is to be expected then."""
    for token in output:
        for place in range(_RECENT - 1):
            recent[place] = recent[place + 1]
        recent[_RECENT - 1] = token
        reader[_NUM_SINCE] += 1
        place = reader[_NEXT]
        if _is_expecting(reader) and _expected(token_ids, replacements, reader) == token:
            _go_on(replacements, reader)
            _agree(reader, place, 1)
            reader[_TRUST] += 1
        elif _is_unreplaced(token_ids, reader, token):
            replacements[reader[_REPLACEMENT], _NUM_OLD] = 0
            reader[_NEXT] += 1
            _agree(reader, place, 1)
            reader[_TRUST] += 1
        else:
            _leave(replacements, reader)
            near = reader[_NEXT] if reader[_LEFT_AT] == _NOTHING else reader[_LEFT_AT]
            place, agreed = _found(token_ids, pairs, places, recent, near, shortest)
            if agreed:
                reader[_NEXT] = place
                _agree(reader, place - agreed, agreed)
                if is_said:
                    reader[_TRUST] = max(reader[_TRUST], agreed)
        # Not within a replacement: the text stands still there, and its row is not to be written over.
        if reader[_LEFT_AT] != _NOTHING and reader[_AGREED] >= _AGREED_ENOUGH and not reader[_INSIDE]:
            _remember(token_ids, replacements, reader, recent)
    return _says_something(replacements, reader, is_said, shortest, trusted)


@numba.njit(cache=True)
def _follow(token_ids, replacements, reader, expected, confidences, is_said, shortest):  # type: ignore[no-untyped-def]
    """Write what comes next, moving ``reader`` on; how many tokens."""
    says_more = is_said or reader[_AGREED] < shortest
    trust = max(1, reader[_TRUST])
    count = 0
    while count < len(expected):
        token = _expected(token_ids, replacements, reader)
        if token == _NOTHING:
            break
        says_more |= reader[_REPLACEMENT] != _NOTHING
        _go_on(replacements, reader)
        expected[count] = token
        confidences[count] = (trust + count) / (trust + count + 1)
        count += 1
    return count if says_more else 0
