"""Every substring of some texts, with how often each was seen and how it went on: a suffix automaton, grown by tokens.

A state stands for the substrings that end at the same places; following a transition appends a token, following the
link drops tokens from the front until the substring was seen in more places (Blumer et al. 1985; for several texts,
Mohri et al. 2009).  Beside that each state counts its occurrences and remembers its likeliest transition, so the text
that follows the longest suffix seen before is read off without a search, with a share for each token.  Appending costs
a constant on average; counts are kept for the `COUNTED_SUFFIXES` longest suffixes of each place, which bounds the cost
of one token in a text that repeats itself.  All of it is compiled.  Knows nothing about sequences or drafts.
"""

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from helix_gateway.core.inner_functions import INNER

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]

COUNTED_SUFFIXES = 64
_NOTHING = -1
"""No state, no transition: indices of arrays have no None."""

# Columns of a state.
_LENGTH, _LINK, _COUNT, _LIKELIEST, _FIRST_TRANSITION = range(5)
# Columns of a transition; those of a state are chained, and all are found by a hash of state and token: its
# table has their numbers from 1 up, 0 where there is none.
_FROM, _TOKEN, _TO, _CHAINED = range(4)
# Sizes.
_STATES, _TRANSITIONS, _LAST = range(3)

_ROOT = 0


@dataclass(slots=True)
class Match:
    """Where a reader stands: a state, and how many of its tokens were really read."""

    state: int = _ROOT
    length: int = 0


class SuffixAutomaton:
    """The substrings of all texts appended so far.

    Args:
        capacity_tokens: room made at once; it grows by itself.
    """

    def __init__(self, capacity_tokens: int = 256) -> None:
        self.num_tokens = 0
        self._states, self._transitions, self._table = _room(capacity_tokens)
        self._sizes = np.array([1, 0, _ROOT], np.int64)
        self._states[_ROOT] = (0, _NOTHING, 0, _NOTHING, _NOTHING)

    def append(self, token_ids: Int32s) -> Match:
        """Go on with the current text: token ids, int32 [num_tokens].

        Returns:
            The longest suffix of the text that was seen before, in this text or an earlier one.
        """
        self._make_room(len(token_ids))
        state, length = _append(self._states, self._transitions, self._table, self._sizes, token_ids)
        self.num_tokens += len(token_ids)
        return Match(state, length)

    def begin_text(self) -> None:
        """End the current text: what is appended next follows nothing."""
        self._sizes[_LAST] = _ROOT

    def read(self, match: Match, token_ids: Int32s) -> Match:
        """Where a reader of another text stands after the next tokens: at its longest suffix that was seen here."""
        state, length = _read(self._states, self._transitions, self._table, match.state, match.length, token_ids)
        return Match(state, length)

    def follow(self, match: Match, token_ids: Int32s, confidences: Float32s) -> int:
        """Write how the text at ``match`` goes on most likely, and how sure each token is.

        Args:
            token_ids, confidences: as long as the most tokens wanted.

        Returns:
            How many were written.
        """
        states, transitions, table = self._states, self._transitions, self._table
        return int(_follow(states, transitions, table, match.state, match.length, token_ids, confidences))

    def _make_room(self, num_tokens: int) -> None:
        # A token makes at most two states and three transitions (a clone's copies are within that bound).
        needed = self.num_tokens + num_tokens
        if 2 * needed + 2 <= len(self._states):
            return
        states, transitions, table = _room(2 * needed)
        num_states, num_transitions = self._sizes[_STATES], self._sizes[_TRANSITIONS]
        states[:num_states] = self._states[:num_states]
        transitions[:num_transitions] = self._transitions[:num_transitions]
        _fill_table(transitions, num_transitions, table)
        self._states, self._transitions, self._table = states, transitions, table


def _room(num_tokens: int) -> tuple[Int32s, Int32s, Int32s]:
    transitions = 3 * num_tokens + 4
    table_size = 1 << (2 * transitions - 1).bit_length()
    return (
        np.empty((2 * num_tokens + 2, 5), np.int32),
        np.empty((transitions, 4), np.int32),
        # Zeroed memory comes from the system page by page as it is used: a large store costs nothing when it is made.
        np.zeros(table_size, np.int32),
    )


@numba.njit(cache=True, inline="always")
def _slot(state, token, mask):  # type: ignore[no-untyped-def]
    mixed = np.uint64(state) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(token) * np.uint64(0xC2B2AE3D27D4EB4F)
    return np.int64((mixed ^ (mixed >> np.uint64(29))) & np.uint64(mask))


@numba.njit(cache=True, **INNER)
def _find(transitions, table, state, token):  # type: ignore[no-untyped-def]
    """The transition of a state by a token, or nothing."""
    mask = len(table) - 1
    slot = _slot(state, token, mask)
    while True:
        place = table[slot] - 1
        if place == _NOTHING or (transitions[place, _FROM] == state and transitions[place, _TOKEN] == token):
            return place
        slot = (slot + 1) & mask


@numba.njit(cache=True, **INNER)
def _enter(transitions, table, place):  # type: ignore[no-untyped-def]
    mask = len(table) - 1
    slot = _slot(transitions[place, _FROM], transitions[place, _TOKEN], mask)
    while table[slot]:
        slot = (slot + 1) & mask
    table[slot] = place + 1


@numba.njit(cache=True)
def _fill_table(transitions, count, table):  # type: ignore[no-untyped-def]
    for place in range(count):
        _enter(transitions, table, place)


@numba.njit(cache=True, **INNER)
def _connect(states, transitions, table, sizes, state, token, target):  # type: ignore[no-untyped-def]
    place = sizes[_TRANSITIONS]
    sizes[_TRANSITIONS] += 1
    transitions[place, _FROM] = state
    transitions[place, _TOKEN] = token
    transitions[place, _TO] = target
    transitions[place, _CHAINED] = states[state, _FIRST_TRANSITION]
    states[state, _FIRST_TRANSITION] = place
    _enter(transitions, table, place)
    return place


@numba.njit(cache=True, **INNER)
def _new_state(states, sizes, length, link, count):  # type: ignore[no-untyped-def]
    state = sizes[_STATES]
    sizes[_STATES] += 1
    states[state, _LENGTH] = length
    states[state, _LINK] = link
    states[state, _COUNT] = count
    states[state, _LIKELIEST] = _NOTHING
    states[state, _FIRST_TRANSITION] = _NOTHING
    return state


@numba.njit(cache=True, **INNER)
def _split(states, transitions, table, sizes, parent, token, target):  # type: ignore[no-untyped-def]
    """A state for those substrings of ``target`` that end a suffix of the text: as long as ``parent`` and a token."""
    clone = _new_state(states, sizes, states[parent, _LENGTH] + 1, states[target, _LINK], states[target, _COUNT])
    likeliest = states[target, _LIKELIEST]
    place = states[target, _FIRST_TRANSITION]
    while place != _NOTHING:
        copy = _connect(states, transitions, table, sizes, clone, transitions[place, _TOKEN], transitions[place, _TO])
        if place == likeliest:
            states[clone, _LIKELIEST] = copy
        place = transitions[place, _CHAINED]
    while parent != _NOTHING:
        place = _find(transitions, table, parent, token)
        if place == _NOTHING or transitions[place, _TO] != target:
            break
        transitions[place, _TO] = clone
        parent = states[parent, _LINK]
    states[target, _LINK] = clone
    return clone


@numba.njit(cache=True, **INNER)
def _longest_known(states, transitions, table, sizes, parent, token):  # type: ignore[no-untyped-def]
    """The state for ``parent`` and a token, which ``parent`` has a transition by; split off where that stands for more."""
    target = transitions[_find(transitions, table, parent, token), _TO]
    if states[target, _LENGTH] == states[parent, _LENGTH] + 1:
        return target
    return _split(states, transitions, table, sizes, parent, token, target)


@numba.njit(cache=True, **INNER)
def _extended(states, transitions, table, sizes, last, token):  # type: ignore[no-untyped-def]
    """The state of the text that was at ``last`` and goes on with a token."""
    if _find(transitions, table, last, token) != _NOTHING:
        return _longest_known(states, transitions, table, sizes, last, token)
    current = _new_state(states, sizes, states[last, _LENGTH] + 1, _ROOT, 0)
    parent = last
    while parent != _NOTHING and _find(transitions, table, parent, token) == _NOTHING:
        _connect(states, transitions, table, sizes, parent, token, current)
        parent = states[parent, _LINK]
    if parent != _NOTHING:
        states[current, _LINK] = _longest_known(states, transitions, table, sizes, parent, token)
    return current


@numba.njit(cache=True, **INNER)
def _count(states, transitions, table, last, current, token):  # type: ignore[no-untyped-def]
    """One more occurrence of each suffix, and of each suffix that the last one was how its beginning went on."""
    state = current
    for _ in range(COUNTED_SUFFIXES):
        if state == _NOTHING:
            break
        states[state, _COUNT] += 1
        state = states[state, _LINK]
    state = last
    for _ in range(COUNTED_SUFFIXES):
        if state == _NOTHING:
            break
        place = _find(transitions, table, state, token)
        likeliest = states[state, _LIKELIEST]
        # Of equals the newest counts.
        if (
            likeliest == _NOTHING
            or states[transitions[place, _TO], _COUNT] >= states[transitions[likeliest, _TO], _COUNT]
        ):
            states[state, _LIKELIEST] = place
        state = states[state, _LINK]


@numba.njit(cache=True)
def _append(states, transitions, table, sizes, token_ids):  # type: ignore[no-untyped-def]
    for token in token_ids:
        last = sizes[_LAST]
        current = _extended(states, transitions, table, sizes, last, token)
        _count(states, transitions, table, last, current, token)
        sizes[_LAST] = current
    state = sizes[_LAST]
    # The text's own end was seen once, just now; what is shorter by a link was seen elsewhere too.
    if states[state, _FIRST_TRANSITION] == _NOTHING and state != _ROOT:
        state = np.int64(states[state, _LINK])
    return state, np.int64(states[state, _LENGTH])


@numba.njit(cache=True, **INNER)
def _shortest_enough(states, state, length):  # type: ignore[no-untyped-def]
    """The state of the last ``length`` tokens: since it was reached, a split may have taken them from this one."""
    while state != _ROOT and length <= states[states[state, _LINK], _LENGTH]:
        state = states[state, _LINK]
    return state


@numba.njit(cache=True)
def _read(states, transitions, table, state, length, token_ids):  # type: ignore[no-untyped-def]
    state = _shortest_enough(states, state, length)
    for token in token_ids:
        place = _find(transitions, table, state, token)
        while place == _NOTHING and state != _ROOT:
            state = states[state, _LINK]
            length = states[state, _LENGTH]
            place = _find(transitions, table, state, token)
        if place != _NOTHING:
            length += 1
            state = _shortest_enough(states, transitions[place, _TO], length)
    return state, length


@numba.njit(cache=True)
def _follow(states, transitions, table, state, length, token_ids, confidences):  # type: ignore[no-untyped-def]
    for count in range(len(token_ids)):
        while state != _ROOT and states[state, _LIKELIEST] == _NOTHING:
            state = states[state, _LINK]
            length = min(length, states[state, _LENGTH])
        place = states[state, _LIKELIEST]
        if place == _NOTHING or length == 0:
            return count
        target = transitions[place, _TO]
        # What follows the text's own end is not known yet, so of the state's occurrences some have no continuation:
        # shares are of those that have.  A share of few occurrences, or after a short match, is worth less.
        followed = max(states[state, _COUNT], states[target, _COUNT])
        token_ids[count] = transitions[place, _TOKEN]
        confidences[count] = np.float32(states[target, _COUNT] / (followed + np.float32(2.0) / length))
        state = target
        length += 1
    return len(token_ids)
