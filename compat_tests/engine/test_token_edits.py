"""Penalties, bias and bans follow the tokens, position by position."""

import random

import numpy as np
import pytest

from helix_gateway.core.request import SamplingParams
from helix_gateway.engine.token_edits import TokenEdits, join_edits
from helix_gateway.engine.verification import verify


def as_dict(edits):
    return {int(t): (float(a), float(b)) for t, a, b in zip(edits.token_ids, edits.scale, edits.shift, strict=True)}


def test_the_repetition_penalty_counts_prompt_and_output_the_others_output_only():
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    edits = TokenEdits(params, [1, 2, 2], frozenset())
    assert as_dict(edits.current()) == {1: (2.0, 0.0), 2: (2.0, 0.0)}
    for token in (2, 3, 3):
        edits.advance(token)
    assert as_dict(edits.current()) == {1: (2.0, 0.0), 2: (2.0, -0.75), 3: (2.0, -1.0)}


@pytest.mark.parametrize("penalty", [5e-324, 1e-45, 1e-38])
def test_the_least_penalties_leave_logits_finite(penalty):
    edits = TokenEdits(SamplingParams(repetition_penalty=penalty), [1], frozenset())
    edits.advance(2)
    assert np.all(edits.current().scale > 0)
    assert np.all(np.isfinite(np.float32(1e4) / edits.current().scale))


def test_a_bad_word_is_banned_where_its_beginning_stands():
    edits = TokenEdits(SamplingParams(bad_words=((4,), (5, 6, 7))), [5, 6], frozenset())
    assert as_dict(edits.current()) == {4: (1.0, -np.inf), 7: (1.0, 0.0)}
    edits.advance(5)
    edits.advance(6)
    assert as_dict(edits.current()) == {4: (1.0, -np.inf), 7: (1.0, -np.inf)}


def test_stop_tokens_are_banned_until_min_tokens_are_out():
    edits = TokenEdits(SamplingParams(min_tokens=1), [1], frozenset({9}))
    assert as_dict(edits.current())[9] == (1.0, -np.inf)
    edits.advance(2)
    assert as_dict(edits.current())[9] == (1.0, 0.0)


def test_each_position_of_a_window_sees_the_drafts_before_it_and_leaves_no_trace():
    params = SamplingParams(frequency_penalty=1.0, bad_words=((8, 9),))
    edits = TokenEdits(params, [1], frozenset())
    edits.advance(3)
    before = as_dict(edits.current())
    window = [as_dict(row) for row in edits.along([8, 3])]
    assert window[0] == before
    assert window[1] == {3: (1.0, -1.0), 8: (1.0, -1.0), 9: (1.0, -np.inf)}
    assert window[2] == {3: (1.0, -2.0), 8: (1.0, -1.0), 9: (1.0, 0.0)}
    assert as_dict(edits.current()) == before


def test_rows_without_edits_have_none_in_the_batch():
    plain = TokenEdits(SamplingParams(), [1, 2], frozenset({3})).current()
    biased = TokenEdits(SamplingParams(logit_bias={7: 2.0}), [1], frozenset()).current()
    joined = join_edits([plain, biased, plain, biased])
    assert plain is None
    assert joined.rows.tolist() == [1, 3]
    assert joined.token_ids.tolist() == [7, 7]
    assert join_edits([plain]).rows.shape == (0,)


def test_accepted_recovered_and_bonus_tokens():
    sampled = [[1, 2, 3], [1, 9, 3], [8, 2, 3], [5], []]
    drafts = [[1, 2], [1, 2], [1, 2], [], []]
    assert verify(sampled, drafts) == [[1, 2, 3], [1, 9], [8], [5], []]


def by_definition(params, prompt, output):
    """Scale and shift of every token that has any, counted anew."""
    edits = {}
    for token in {*prompt, *output, *params.logit_bias, *(word[-1] for word in params.bad_words)}:
        scale = params.repetition_penalty if token in prompt or token in output else 1.0
        shift = params.logit_bias.get(token, 0.0) - params.presence_penalty * (token in output)
        shift -= params.frequency_penalty * output.count(token)
        if any((*output, token)[-len(word) :] == word for word in params.bad_words if word[-1] == token):
            shift = -np.inf
        edits[token] = (scale, shift)
    return {token: edit for token, edit in edits.items() if edit != (1.0, 0.0)}


@pytest.mark.parametrize("seed", range(20))
def test_windows_of_any_tokens_are_as_the_definition_says_however_long_the_output(seed):
    dice = random.Random(seed)
    options = {
        "repetition_penalty": dice.choice([1.0, 1.25]),
        "presence_penalty": dice.choice([0.0, 0.5]),
        "frequency_penalty": dice.choice([0.0, 0.25]),
        "logit_bias": dice.choice([{}, {3: 1.5, 70: -1.0}]),
        "bad_words": dice.choice([(), ((4,), (5, 6), (1, 2, 3))]),
    }
    params, prompt, output = SamplingParams(**options), [dice.randrange(99) for _ in range(9)], ()
    edits = TokenEdits(params, prompt, frozenset())
    for _ in range(40):
        drafts = [dice.randrange(99) for _ in range(dice.randrange(5))]
        rows = edits.along(drafts)
        for count, row in enumerate(rows):
            found = {} if row is None else {token: edit for token, edit in as_dict(row).items() if edit != (1.0, 0.0)}
            assert found == by_definition(params, prompt, (*output, *drafts[:count]))
        for token in [*drafts[: dice.randrange(len(drafts) + 1)], dice.randrange(99)]:
            edits.advance(token)
            output = (*output, token)
