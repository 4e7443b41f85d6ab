"""The automaton against counting every substring, over random texts of few letters."""

import random
from collections import Counter

import numpy as np
import pytest

from helix_gateway.engine.drafters.suffix_automaton import Match, SuffixAutomaton


def ids(tokens):
    return np.array(tokens, np.int32)


def automaton_of(texts, dice=None):
    """Room for one token at first, so that it has to grow."""
    automaton = SuffixAutomaton(1)
    for number, text in enumerate(texts):
        if number:
            automaton.begin_text()
        rest = list(text)
        while rest:
            count = dice.randrange(1, 5) if dice else len(rest)
            automaton.append(ids(rest[:count]))
            rest = rest[count:]
    return automaton


def occurrences(texts):
    counts = Counter()
    for text in texts:
        for start in range(len(text)):
            counts.update(tuple(text[start:end]) for end in range(start + 1, len(text) + 1))
    return counts


def follow(automaton, match, depth):
    token_ids, confidences = np.empty(depth, np.int32), np.empty(depth, np.float32)
    count = automaton.follow(match, token_ids, confidences)
    return token_ids[:count].tolist(), confidences[:count].tolist()


@pytest.mark.parametrize("seed", range(60))
def test_every_substring_is_found_and_goes_on_as_it_did_most_often(seed):
    dice = random.Random(seed)
    letters = dice.choice([2, 3, 5])
    texts = [[dice.randrange(letters) for _ in range(dice.randrange(1, 30))] for _ in range(dice.randrange(1, 4))]
    automaton, counts = automaton_of(texts, dice), occurrences(texts)
    for substring, count in counts.items():
        match = automaton.read(Match(), ids(substring))
        assert match.length == len(substring)
        followers = {letter: counts[(*substring, letter)] for letter in range(letters)}
        if not any(followers.values()):
            continue
        (token,), (confidence,) = follow(automaton, match, 1)
        assert followers[token] == max(followers.values())
        assert confidence == pytest.approx(followers[token] / (count + 2 / len(substring)), rel=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_end_seen_before_is_told_as_a_text_grows(seed):
    dice = random.Random(seed)
    automaton, text = SuffixAutomaton(1), []
    for _ in range(40):
        new = [dice.randrange(3) for _ in range(dice.randrange(1, 4))]
        text += new
        match = automaton.append(ids(new))
        counts = occurrences([text])
        wanted = max(n for n in range(len(text) + 1) if n == 0 or counts[tuple(text[-n:])] > 1)
        assert match.length == wanted


def test_a_reader_whose_place_is_split_meanwhile_reads_on_rightly():
    automaton = automaton_of([[1, 2, 3, 4, 5]])
    match = automaton.read(Match(), ids([3]))
    automaton.append(ids([9, 3, 8, 3, 8]))  # now 3 goes on as 8 more often, and stands for more places than 2 3 does
    assert follow(automaton, automaton.read(match, ids([])), 2)[0][0] == 8


def test_what_was_never_seen_has_no_continuation():
    automaton = automaton_of([[1, 2, 3]])
    assert follow(automaton, automaton.read(Match(), ids([7])), 4) == ([], [])
    assert follow(SuffixAutomaton(), Match(), 4) == ([], [])


def test_of_equally_frequent_continuations_the_newest_counts():
    automaton = automaton_of([[1, 2, 5, 1, 3, 5, 1]])
    assert follow(automaton, automaton.read(Match(), ids([5, 1])), 1)[0] == [3]


def test_a_text_that_repeats_itself_is_drafted_beyond_its_end():
    automaton = SuffixAutomaton()
    match = automaton.append(ids([1, 2, 3] * 5))
    assert follow(automaton, match, 9)[0] == [1, 2, 3] * 3
