"""A known text beside an answer that goes along it, with changes."""

import inspect
import random
import textwrap

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helix_gateway.engine.drafters.followed_text import PREDICTION, PROMPT, FollowedText


def followed(token_ids, belief=PREDICTION):
    """A text that nothing was read beside yet."""
    return FollowedText(np.array(token_ids, np.int32), belief)


def expected(text, depth=4):
    """What is expected next, and how sure that is."""
    token_ids, confidences = np.empty(depth, np.int32), np.empty(depth, np.float32)
    count = text.follow(token_ids, confidences)
    return token_ids[:count].tolist(), confidences[:count].tolist()


def after(text, output, depth=4):
    """What is expected once an answer was read token by token."""
    for token in output:
        text.read(np.array([token], np.int32))
    return expected(text, depth)[0]


def follow_all(known_ids, output, depth):
    """Draft tokens that were accepted while the output came, and steps."""
    text, place, accepted, steps = followed(known_ids), 0, 0, 0
    output = np.array(output, np.int32)
    while place < len(output):
        token_ids, right = expected(text, depth)[0], 0
        while right < len(token_ids) and place + right < len(output) - 1 and token_ids[right] == output[place + right]:
            right += 1
        accepted, steps = accepted + right, steps + 1
        text.read(output[place : place + right + 1])
        place += right + 1
    return accepted, steps


def test_a_right_text_is_accepted_from_the_first_token_on():
    text = list(range(100, 400))
    accepted, steps = follow_all(text, text, 15)
    assert steps == 19
    assert accepted == 300 - steps


def test_a_text_of_4000_tokens_with_40_lines_changed_keeps_nine_in_ten_of_the_others():
    dice = random.Random(3)
    lines = [line for line in inspect.getsource(textwrap).splitlines() + inspect.getsource(random).splitlines() if line]
    lines = lines[:270]
    places = dice.sample(range(5, len(lines) - 5), 40)
    removed, inserted = set(places[:20]), set(places[20:])
    edited, kept = [], []
    for number, line in enumerate(lines):
        if number in inserted:
            edited.append(dice.choice(["    # nothing of the kind", "    return answer, place", "    x = [1, 2, 3]"]))
        if number not in removed:
            edited.append(line)
            kept.append(line)
    numbers = {}

    def tokens(some_lines):
        pieces = "\n".join(some_lines).replace("\n", " \n ").split(" ")
        return [numbers.setdefault(piece, len(numbers)) for piece in pieces]

    before, written = tokens(lines), tokens(edited)
    assert 3500 < len(before) < 4500
    accepted, _ = follow_all(before, written, 32)
    assert accepted > 0.9 * len(tokens(kept))  # though each window's bonus token is no draft


def test_an_output_that_jumps_far_is_found_again():
    text = list(range(100, 5000))
    accepted, _ = follow_all(text, [*text[:50], *text[3000:3200]], 8)
    assert accepted > 200


def test_a_text_that_has_nothing_to_do_with_the_answer_proposes_no_more_after_its_start():
    text = followed(range(100, 200))
    assert expected(text)[0] == [100, 101, 102, 103]
    assert [after(text, [token]) for token in range(1000, 1100)] == [[]] * 100


def test_a_prompt_is_followed_from_anywhere_and_drafted_from_where_a_suffix_says_less():
    text = followed(range(100, 200), PROMPT)
    assert after(text, range(120, 140)) == []  # what followed the same tokens before says as much
    assert after(text, [7]) == []
    assert after(text, [141]) == [142, 143, 144, 145]
    assert after(text, [142]) == [143, 144, 145, 146]
    assert after(text, [143]) == []


def test_a_prompt_is_believed_to_be_written_again_once_enough_of_it_was():
    # A place is found by three tokens; those after it are trusted, a quarter of them behind a divergence.
    for num_before, drafted in ((14, []), (15, [157, 158, 159, 160])):
        text = followed(range(100, 200), PROMPT)
        begin = 155 - num_before
        assert after(text, range(begin, 155)) == []
        assert after(text, [7, 156]) == drafted


def test_what_is_replaced_in_a_prompt_is_drafted_replaced():
    before = [*range(10, 30), 7, *range(40, 50), 7, 60, 61]
    text = followed(before, PROMPT)
    assert after(text, [*range(10, 30), 8, *range(40, 46)], 6) == [46, 47, 48, 49, 8, 60]
    assert after(text, range(46, 50), 2) == [8, 60]


def test_of_places_as_likely_the_nearest_to_where_the_text_was_left_is_taken():
    phrase, text = [1, 2, 3], []
    for number in range(10):
        text += [*phrase, 100 + number, *range(1000 + 20 * number, 1020 + 20 * number)]
    left = [*range(1080, 1094)]  # most of the fifth piece
    assert after(followed(text), [*text[:24], *left, 7, *phrase])[0] == 105


REPLACED = [([7], [8]), ([7, 6], [8]), ([7], [8, 9, 5]), ([7, 6, 4], [8, 9])]


def test_what_is_changed_throughout_costs_its_first_occurrence_alone():
    pieces = [list(range(10 * number, 10 * number + 8)) for number in range(10, 30)]
    for old, new in REPLACED:
        before = [token for piece in pieces for token in (*piece, *old)]
        changed = [token for piece in pieces for token in (*piece, *new)]
        accepted, steps = follow_all(before, changed, 15)
        # A window more than without any change at the first place, and as many as it takes to be sure of it.
        assert steps <= -(-len(changed) // 16) + 4 + len(new), (old, new)
        assert accepted == len(changed) - steps


def test_changes_that_stand_close_together_are_each_remembered():
    pieces = [list(range(100 + 10 * number, 105 + 10 * number)) for number in range(30)]
    for old, new in REPLACED:
        for other_old, other_new in (([1], [2]), ([1, 3], [2]), ([1], [2, 4])):
            # First one of them alone, then the other too, two tokens before it: the known one comes while that is proved.
            both = [(400 + number, 500 + number) if number > 2 else () for number in range(30)]
            before = [t for p, q in zip(pieces, both, strict=True) for t in (*p, *(other_old if q else ()), *q, *old)]
            changed = [t for p, q in zip(pieces, both, strict=True) for t in (*p, *(other_new if q else ()), *q, *new)]
            _, steps = follow_all(before, changed, 15)
            assert steps <= -(-len(changed) // 16) + 14, (old, new, other_old, other_new)


def test_of_many_changes_the_newest_are_remembered_and_what_is_too_long_is_not():
    text = followed([token for number in range(10, 22) for token in (number, 100 + number, 200 + number)] * 2)
    for number in range(10, 22):
        text.read(np.array([300 + number, 100 + number, 200 + number], np.int32))
    assert after(text, []) == [10, 110, 210, 11]  # twelve were changed, and four are forgotten
    assert after(text, [10, 110, 210, 11, 111, 211, 12, 112, 212, 13, 113, 213])[:2] == [314, 114]
    long_ago = followed([*range(10, 20), 1, 2, 3, 4, 5, *range(30, 50), 1, 2, 3, 4, 5, 60])
    assert after(long_ago, [*range(10, 20), 9, 8, *range(30, 50)], 3) == [1, 2, 3]


def test_one_token_behind_a_replaced_one_is_enough_to_go_on():
    text = followed(range(100, 200))
    assert after(text, [100, 101, 7]) == []
    assert after(text, [103]) == [104, 105, 106, 107]
    assert expected(text)[1][0] == 0.5


def test_a_change_that_is_made_no_more_is_forgotten():
    before = [10, 11, 12, 7, 13, 14, 15, 7, 16, 17, 18, 7, 19, 20, 21]
    output = [10, 11, 12, 8, 13, 14, 15, 7]
    assert after(followed(before), output, 7) == [16, 17, 18, 7, 19, 20, 21]


def test_a_text_at_its_end_expects_nothing():
    assert after(followed([1, 2, 3]), [1, 2, 3]) == []
    for short in ([], [1]):
        assert after(followed(short), [1, 1, 1]) == []


TOKENS = st.lists(st.integers(100, 104), max_size=80)


@given(text=TOKENS, output=TOKENS, belief=st.sampled_from([PREDICTION, PROMPT]), sizes=st.lists(st.integers(1, 9)))
def test_how_many_tokens_are_read_at_once_and_who_asks_meanwhile_does_not_matter(text, output, belief, sizes):
    asked, in_pieces = (followed(text, belief) for _ in range(2))
    answer, place = np.array(output, np.int32), 0
    for size in [*sizes, len(output)]:
        in_pieces.read(answer[place : place + size])
        place += size
    for token in output:
        asked.read(np.array([token], np.int32))
        assert set(expected(asked, 40)[0]) <= {*text, *output}
    assert expected(asked, 40) == expected(in_pieces, 40)
    assert all(0.0 < confidence < 1.0 for confidence in expected(in_pieces, 40)[1])


def edited(text, dice):
    """A text in which names are changed throughout, and lines are put in and left out here and there."""
    names = {name: dice.sample(range(20, 30), dice.randint(1, 4)) for name in dice.sample(range(10), 3)}
    changed = []
    for token in text:
        changed += names.get(token, [token])
        changed = changed[:-1] if dice.random() < 0.02 else changed
        changed += [dice.randrange(40)] if dice.random() < 0.02 else []
    return changed


def test_texts_that_are_edited_at_random_are_followed_without_a_token_from_nowhere():
    dice = random.Random(5)
    for _ in range(200):
        text = [dice.choice([dice.randrange(10), dice.randrange(50, 90)]) for _ in range(150)]
        output = edited(text, dice)
        reader = followed(text, dice.choice([PREDICTION, PROMPT]))
        for token in output:
            reader.read(np.array([token], np.int32))
            assert set(expected(reader, 64)[0]) <= {*text, *output}
