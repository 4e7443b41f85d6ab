"""A grammar holds an answer at every position, drafted or not, and neither drafts nor neighbours can be seen in it."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_tests.engine.toy import EOS, VOCAB, Answers, ScriptedDrafter, alone, drain, make_engine, request
from helix_gateway.engine.depth import FixedDepth
from helix_gateway.engine.engine import ChoiceHooks


class Pattern:
    """Allows, after n tokens, those that leave the same rest as what the tokens add up to; ends when there are enough."""

    def __init__(self, step=3, ends_after=9):
        self.step, self.ends_after = step, ends_after
        self.tokens = []

    def allows(self, token):
        if len(self.tokens) == self.ends_after:
            return token == EOS
        return token != EOS and token % self.step == sum(self.tokens) % self.step

    def fill_mask(self, mask):
        bits = np.zeros(32 * len(mask), np.uint8)
        bits[:VOCAB] = [self.allows(token) for token in range(VOCAB)]
        mask[:] = np.packbits(bits, bitorder="little").view(np.uint32)

    def advance(self, token_id):
        assert token_id != EOS
        assert self.allows(token_id)
        self.tokens.append(token_id)

    def rollback(self, num_tokens):
        del self.tokens[len(self.tokens) - num_tokens :]


class Faulty(Pattern):
    """Raises once it has come some way."""

    def fill_mask(self, mask):
        if len(self.tokens) == 3:
            raise ZeroDivisionError
        super().fill_mask(mask)


def some_requests(temperature):
    for i, prompt in enumerate(([1, 2, 3], [4] * 9, [7])):
        yield request(f"r{i}", prompt, temperature=temperature, seed=i, max_tokens=14, n=2, presence_penalty=0.5)


def hooks():
    """One choice is held to a pattern, the other is free."""
    return [ChoiceHooks(constraint=Pattern()), ChoiceHooks()]


def generate(temperature, **options):
    engine, answers = make_engine(60, budget=20, **options), Answers()
    for request_ in some_requests(temperature):
        engine.submit(request_, hooks())
        answers.take(engine.step())
    drain(engine, answers)
    return engine, {key: (answer.token_ids, answer.last.stop_reason) for key, answer in answers.items()}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_keeps_to_its_pattern_to_the_end_and_the_others_stay_free(temperature):
    answers = {}
    for request_ in some_requests(temperature):
        engine = make_engine()
        engine.submit(request_, hooks())
        answers |= drain(engine)
        free = alone(request_)
        assert answers[request_.request_id, 1].token_ids == free[request_.request_id, 1].token_ids
    for (_, index), answer in answers.items():
        if index == 0:
            pattern = Pattern()
            for token in answer.token_ids:
                pattern.advance(token)
            assert len(answer.token_ids) == pattern.ends_after
            assert (answer.last.finish_reason, answer.last.stop_reason) == ("stop", None)


@settings(deadline=None, max_examples=25)
@given(temperature=st.sampled_from([0.0, 1.0]), depth=st.integers(1, 6), error_rate=st.sampled_from([0, 0.4, 1]))
def test_drafts_change_nothing_good_or_bad_and_those_that_break_the_pattern_neither(temperature, depth, error_rate):
    _, wanted = generate(temperature)
    dice = random.Random(depth)

    def oracle(sequence, tokens):
        future = [*sequence.request.prompt_token_ids, *wanted[sequence.key][0], EOS, EOS]
        known = len(tokens) < len(future) and dice.random() >= error_rate
        return future[len(tokens)] if known else dice.randrange(VOCAB)

    engine, got = generate(temperature, drafter=ScriptedDrafter(oracle), depth_policy=FixedDepth(depth))
    assert got == wanted
    assert engine.cache.pool.num_referenced == 0


def test_a_constrained_answer_survives_preemption():
    engine = make_engine(9)
    for i in range(3):
        engine.submit(
            request(f"r{i}", [i + 1] * 9, temperature=1.0, max_tokens=14), [ChoiceHooks(constraint=Pattern())]
        )
    answers = drain(engine)
    assert engine.num_preemptions > 0
    for i in range(3):
        large = make_engine(200)
        large.submit(request(f"r{i}", [i + 1] * 9, temperature=1.0, max_tokens=14), [ChoiceHooks(constraint=Pattern())])
        assert answers[f"r{i}", 0].token_ids == drain(large)[f"r{i}", 0].token_ids


def test_a_constraint_that_raises_ends_its_own_request_only():
    engine = make_engine()
    fine = request("fine", [3, 4], ignore_eos=True, temperature=0.0)
    engine.submit(request("faulty", [1, 2]), [ChoiceHooks(constraint=Faulty())])
    engine.submit(fine)
    answers = drain(engine)
    assert answers["faulty", 0].last.finish_reason == "error"
    assert "ZeroDivisionError" in answers["faulty", 0].last.error
    assert len(answers["faulty", 0].token_ids) == 3
    assert answers["fine", 0].token_ids == alone(fine)["fine", 0].token_ids
    assert engine.cache.pool.num_referenced == 0
