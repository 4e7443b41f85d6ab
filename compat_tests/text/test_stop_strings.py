"""Stop strings end a text where they are first complete, however it arrives, and no text is sent too early."""

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_gateway.text.stop_strings import StopStringFilter

# Few letters, so that stop strings overlap each other and themselves.
LETTERS = st.text("ab<", max_size=30)
STOPS = st.lists(st.text("ab<", min_size=1, max_size=5), min_size=1, max_size=4)


def first_stop(text, stops):
    """By definition: the occurrence that ends first, of those that end together the longest."""
    found = [(end, -len(stop), stop) for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)]
    return min(found, default=None)


def cut(text, places):
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(text=LETTERS, stops=STOPS, places=st.lists(st.integers(0, 100), max_size=8), include=st.booleans())
def test_the_text_ends_at_the_first_stop_however_it_is_cut(text, stops, places, include):
    filtered = StopStringFilter(stops, include_in_output=include)
    sent = "".join([filtered.feed(piece) for piece in cut(text, places)])
    sent += filtered.flush()
    match = first_stop(text, stops)
    if match is None:
        assert (sent, filtered.matched) == (text, None)
        return
    end, length, stop = match
    assert filtered.matched == stop
    assert sent == text[: end if include else end + length]


@given(text=LETTERS, stops=STOPS)
def test_exactly_what_could_become_a_stop_is_held_back(text, stops):
    filtered = StopStringFilter(stops)
    sent = ""
    for count, letter in enumerate(text, start=1):
        sent += filtered.feed(letter)
        if filtered.matched:
            break
        seen = text[:count]
        beginnings = {stop[:length] for stop in stops for length in range(len(stop))}
        held = max((end for end in beginnings if seen.endswith(end)), key=len)
        assert sent + held == seen


def test_nothing_is_passed_on_after_the_stop():
    filtered = StopStringFilter(["\n\n"])
    assert [filtered.feed(piece) for piece in ("one\n", "\ntwo", "three")] == ["one", "", ""]
    assert filtered.flush() == ""


def test_the_order_of_the_stop_strings_does_not_matter():
    for stops in (["lo", "ell"], ["ell", "lo"]):
        filtered = StopStringFilter(stops)
        assert filtered.feed("hello") == "h"
        assert filtered.matched == "ell"


def test_an_end_that_only_looked_like_a_stop_is_sent():
    filtered = StopStringFilter(["<|end|>"])
    assert filtered.feed("a <|e") == "a "
    assert filtered.feed("gg") == "<|egg"
    assert filtered.feed(" <") == " "
    assert filtered.flush() == "<"


def test_without_stop_strings_text_passes_at_once():
    filtered = StopStringFilter([])
    assert filtered.feed("anything") == "anything"
    assert filtered.flush() == ""


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["nearly", "random"])
def test_the_most_and_longest_stop_strings_cost_microseconds_a_token(kind):
    rng = random.Random(0)
    almost = "ab" * 511 + "a"
    stops = [(almost if kind == "nearly" else "".join(rng.choices("ab", k=1023))) + chr(200 + n) for n in range(64)]
    pieces = ["abab"] * 5000 if kind == "nearly" else ["".join(rng.choices("ab", k=4)) for _ in range(5000)]
    filtered = StopStringFilter(stops)
    started = time.perf_counter()
    sent = "".join([filtered.feed(piece) for piece in pieces])
    elapsed = time.perf_counter() - started
    assert sent + filtered.flush() == "".join(pieces)
    # A step of the engine takes milliseconds; measured here: 30 to 90 microseconds a token.
    assert elapsed / len(pieces) < 1e-3


@pytest.mark.alone
def test_a_megabyte_at_once_is_searched_once():
    filtered = StopStringFilter(["a" * 1023 + "b", "end"])
    started = time.perf_counter()
    sent = filtered.feed("a" * 1_000_000)
    assert time.perf_counter() - started < 1.0
    assert len(sent) == 1_000_000 - 1023
