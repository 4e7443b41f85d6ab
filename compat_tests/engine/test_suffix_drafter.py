"""Drafts from known text: this sequence's own, earlier answers, predictions."""

from types import SimpleNamespace

import numpy as np
import pytest

from compat_tests.engine.toy import request
from helix_gateway.engine.drafters import followed_text, suffix_automaton
from helix_gateway.engine.drafters.followed_text import FollowedText
from helix_gateway.engine.drafters.output_store import OutputStore, OutputStores
from helix_gateway.engine.drafters.suffix import SuffixDrafter


def sequence(name, prompt, output=(), *, salt="", prediction=(), finish_reason=None):
    asked = request(name, prompt, cache_salt=salt)
    return SimpleNamespace(
        key=(name, 0),
        request=SimpleNamespace(prediction_token_ids=list(prediction), cache_salt=asked.cache_salt),
        token_ids=[*prompt, *output],
        num_prompt_tokens=len(prompt),
        finish_reason=finish_reason,
    )


def draft(drafter, sequence_, depth=4):
    (drafted,) = drafter.propose([sequence_], [depth])
    return drafted.source, drafted.token_ids.tolist()


def test_what_followed_the_same_words_before_is_proposed():
    assert draft(SuffixDrafter(), sequence("a", [5, 6, 7, 8, 9, 1, 5, 6])) == ("suffix", [7, 8, 9, 1])


def test_tokens_that_came_since_are_caught_up_with():
    drafter, one = SuffixDrafter(), sequence("a", [5, 6, 7, 8, 9])
    assert draft(drafter, one)[1] == []
    one.token_ids += [1, 2, 5, 6]
    assert draft(drafter, one, 2) == ("suffix", [7, 8])


def test_earlier_answers_help_later_requests_of_the_same_salt_alone():
    drafter = SuffixDrafter()
    drafter.retire(sequence("first", [1], [21, 22, 23, 24, 25], salt="mine", finish_reason="stop"))
    assert draft(drafter, sequence("second", [9, 21, 22], salt="mine"), 3) == ("store", [23, 24, 25])
    assert draft(drafter, sequence("third", [9, 21, 22], salt="yours"), 3)[1] == []


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_was_broken_off_teaches_nothing(reason):
    drafter = SuffixDrafter()
    drafter.retire(sequence("first", [1], [21, 22, 23], finish_reason=reason))
    assert draft(drafter, sequence("second", [9, 21, 22]))[1] == []


def test_a_sequence_that_ended_is_forgotten():
    drafter, one = SuffixDrafter(), sequence("a", [5, 6, 7, 5, 6])
    draft(drafter, one)
    drafter.retire(one)
    assert not drafter._readers


def test_who_reads_step_by_step_finds_what_one_finds_who_reads_all_at_once_whatever_the_store_forgets():
    dice = np.random.default_rng(3)
    drafter, one = SuffixDrafter(store_tokens=100), sequence("a", dice.integers(0, 5, 40).tolist())
    sources = set()
    for step in range(300):
        one.token_ids += dice.integers(0, 5, dice.integers(0, 4)).tolist()
        if step % 4 == 0:
            answer = dice.integers(0, 5, 30).tolist()
            drafter.retire(sequence(f"old{step}", [1], answer, finish_reason="stop"))
        step_by_step = drafter.propose([one], [6])[0]
        reader = drafter._readers.pop(one.key)
        at_once = drafter.propose([one], [6])[0]
        drafter._readers[one.key] = reader
        assert step_by_step.source == at_once.source
        assert step_by_step.token_ids.tolist() == at_once.token_ids.tolist()
        assert step_by_step.confidences.tolist() == at_once.confidences.tolist()
        sources.add(step_by_step.source)
    assert sources == {"suffix", "copy", "store"}


def test_a_store_that_fails_while_it_is_read_is_read_anew():
    drafter, one = SuffixDrafter(), sequence("a", [9, 21, 22])
    drafter.retire(sequence("first", [1], [21, 22, 23, 24, 25], finish_reason="stop"))
    assert draft(drafter, one, 2) == ("store", [23, 24])
    one.token_ids.append(23)
    (store,) = drafter._stores.generations("")
    with pytest.MonkeyPatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(type(store), "read", full)
        drafter.propose([one], [2])
    assert draft(drafter, one, 2) == ("store", [24, 25])


def full(*_):
    raise MemoryError


def test_a_store_keeps_the_newest_answers_and_no_more_than_it_may():
    store = OutputStore(100)
    for start in range(0, 2000, 20):
        store.add(np.arange(start, start + 20, dtype=np.int32))
    assert sum(generation.num_tokens for generation in store.generations()) <= 100
    drafter = SuffixDrafter(store_tokens=100)
    for start in range(0, 2000, 20):
        drafter.retire(sequence("old", [1], range(start, start + 20), finish_reason="length"))
    assert draft(drafter, sequence("new", [3, 1985, 1986]), 2) == ("store", [1987, 1988])
    assert draft(drafter, sequence("other", [3, 5, 6]), 2)[1] == []


def test_salts_that_nobody_uses_any_more_are_forgotten():
    stores = OutputStores(100)
    for number in range(50):
        stores.add(f"salt {number}", [1, 2, 3])
    assert len(stores._stores) == 16


def test_asking_about_salts_that_have_no_answers_costs_those_that_have_nothing():
    drafter = SuffixDrafter()
    drafter.retire(sequence("first", [1], [21, 22, 23], salt="mine", finish_reason="stop"))
    for number in range(40):
        draft(drafter, sequence(f"s{number}", [9, 21, 22], salt=f"salt {number}"))
    assert draft(drafter, sequence("second", [9, 21, 22], salt="mine"), 1) == ("store", [23])


def test_a_long_prompt_is_indexed_piece_by_piece_and_drafted_from_when_all_of_it_is():
    drafter, one = SuffixDrafter(), sequence("a", [*range(3000), 17, 18])
    drafted = [draft(drafter, one, 2)[1] for _ in range(3)]
    assert drafted == [[], [], [19, 20]]
    assert max(reader.num_indexed for reader in drafter._readers.values()) == 3002


def test_a_long_answer_is_remembered_piece_by_piece():
    drafter = SuffixDrafter()
    drafter.retire(sequence("first", [1], range(100, 3100), finish_reason="stop"))
    asked = [sequence(f"s{i}", [9, 3000, 3001]) for i in range(3)]
    assert [draft(drafter, one, 1)[1] for one in asked] == [[], [3002], [3002]]
    across = sequence("t", [9, 100 + 1022, 100 + 1023])
    assert draft(drafter, across, 2) == ("store", [100 + 1024, 100 + 1025])


def test_what_is_indexed_at_a_step_is_bounded_for_all_sequences_together():
    drafter = SuffixDrafter()
    crowd = [sequence(f"s{i}", [*range(i, i + 600), i, i + 1]) for i in range(5)]
    for step in range(1, 6):
        drafts = drafter.propose(crowd, [1] * 5)
        indexed = sum(reader.num_indexed for reader in drafter._readers.values())
        assert indexed <= (1024 + 5 * 32) * step
    assert [d.token_ids.tolist() for d in drafts] == [[i + 2] for i in range(5)]


def texts(dice, num_texts, num_tokens):
    """Texts of as many tokens, half of them phrases that come again."""
    phrases = [dice.zipf(1.2, 12) % 49_000 for _ in range(400)]
    pieces = [
        phrases[number] if number < 400 else dice.zipf(1.2, 12) % 49_000 for number in dice.integers(0, 800, 30_000)
    ]
    some = np.concatenate(pieces)
    return [some[first : first + num_tokens].tolist() for first in dice.integers(0, len(some) - num_tokens, num_texts)]


class Counted(np.ndarray):
    """An array that counts what of it is looked at."""

    looked_at = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        Counted.looked_at += np.size(found)
        return found


def count_looks(monkeypatch, *automata):
    """From now on these are read by the Python that is compiled otherwise, of arrays that count."""
    for name, function in vars(suffix_automaton).copy().items():
        if hasattr(function, "py_func"):
            monkeypatch.setattr(suffix_automaton, name, function.py_func)
    for automaton in automata:
        for name in ("_states", "_transitions", "_table"):
            monkeypatch.setattr(automaton, name, getattr(automaton, name).view(Counted))
    monkeypatch.setattr(Counted, "looked_at", 0)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # hashes wrap around
def test_proposing_for_16_sequences_of_8000_tokens_over_a_store_of_a_million_is_no_scan(monkeypatch):
    dice = np.random.default_rng(1)
    drafter = SuffixDrafter(store_tokens=2_200_000)
    for number, answer in enumerate(texts(dice, 1000, 1000)):
        drafter.retire(sequence(f"old{number}", [1], answer, finish_reason="stop"))
    stores = drafter._stores.generations("")
    assert sum(store.num_tokens for store in stores) == 1_000_000
    crowd = [sequence(f"s{number}", text) for number, text in enumerate(texts(dice, 16, 7_900))]
    while sum(reader.num_indexed for reader in drafter._readers.values()) < 16 * 7_900:
        drafter.propose(crowd, [8] * 16)
    count_looks(monkeypatch, *stores, *(reader.own for reader in drafter._readers.values()))
    drafted, steps = 0, 20
    for step in range(steps):
        for one in crowd:
            one.token_ids.append(one.token_ids[step])
        drafted += sum(len(each.token_ids) for each in drafter.propose(crowd, [8] * 16))
        assert 0 < Counted.looked_at < 500 * 16 * (step + 1)
    assert drafted > steps * 16


def test_the_prediction_is_tried_before_anything_else_is_known():
    one = sequence("a", [1, 2, 3], prediction=[50, 51, 52])
    assert draft(SuffixDrafter(), one) == ("prediction", [50, 51, 52])


def test_an_answer_that_goes_along_the_prompt_is_drafted_from_it_though_names_change():
    prompt = [1, 2, 3, *range(10, 20), 7, *range(30, 40), 7, 50, 51, 52, 53]
    one = sequence("a", prompt, [*range(10, 20), 8, 30, 31, 32])
    assert draft(SuffixDrafter(), one, 10) == ("copy", [*range(33, 40), 8, 50, 51])


def test_a_long_prompt_is_followed_from_where_the_answer_is_when_all_of_it_is_indexed():
    drafter, one = SuffixDrafter(), sequence("a", range(3000), [2000, 2001, 2002, 9000, 2004])
    followed = [draft(drafter, one, 2), draft(drafter, one, 2), draft(drafter, one, 2)]
    assert [token_ids for _, token_ids in followed] == [[], [], [2005, 2006]]


def test_the_prediction_goes_before_the_prompt_where_both_say_the_same():
    text = list(range(10, 40))
    prompt, output = [1, 2, *text, 3], [*text[:16], 7, text[17]]
    assert draft(SuffixDrafter(), sequence("a", prompt, output)) == ("copy", text[18:22])
    assert draft(SuffixDrafter(), sequence("a", prompt, output, prediction=text)) == ("prediction", text[18:22])


def test_a_text_whose_reading_fails_is_read_to_its_end_the_next_time():
    text = list(range(10, 40))
    drafter, one = SuffixDrafter(), sequence("a", [1, 2, *text, 3], text[:16], prediction=text)
    draft(drafter, one)
    one.token_ids += [7]
    for broken in (followed_text.PREDICTION, followed_text.PROMPT):
        one.token_ids.append(one.token_ids[-1] + 1 if one.token_ids[-1] > 7 else text[17])
        with pytest.MonkeyPatch.context() as failing, pytest.raises(MemoryError):
            failing.setattr(FollowedText, "read", failing_for(broken, FollowedText.read))
            drafter.propose([one], [2])
    expected = draft(SuffixDrafter(), one)
    assert draft(drafter, one) == expected
    assert expected[0] == "prediction"


def failing_for(belief, read):
    def read_or_fail(self, token_ids):
        if self._belief is belief:
            raise MemoryError
        read(self, token_ids)

    return read_or_fail
