"""Depths against trying them all; costs and chances as they are learned."""

import itertools
import math
from types import SimpleNamespace

import numba
import numpy as np
import pytest

from compat_tests.engine.toy import ToyRunner
from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.core.kv import KVGroup
from helix_gateway.engine import step_costs
from helix_gateway.engine.acceptance import AcceptanceModel
from helix_gateway.engine.depth import WORTH_IT, AdaptiveDepth, _best_depths
from helix_gateway.engine.drafters.base import DraftTokens
from helix_gateway.engine.step_costs import StepCosts, measure_costs


def draft(confidences, tokens=None, source="suffix"):
    tokens = range(len(confidences)) if tokens is None else tokens
    return DraftTokens(source, np.array(tokens, np.int32), np.array(confidences, np.float32))


def random_costs(dice):
    steps = np.cumsum(dice.uniform(0, 1, 4)) * dice.uniform(0.001, 0.05)
    return StepCosts(dict(zip((1, 4, 8, 32), 0.02 + steps)))


def all_known(num_drafts):
    """No draft of which nothing is known, and how many tokens those may have."""
    return np.zeros(num_drafts, bool), 0


@pytest.mark.parametrize("worth_it, share", [(1.0, 1 - 1e-9), (WORTH_IT, 0.98)])
@pytest.mark.parametrize("seed", range(80))
def test_the_depths_are_the_best_of_all_there_are(seed, worth_it, share):
    """As far as it is asked for that speculation be worth it: depth 0 forgoes what brings less than that."""
    dice = np.random.default_rng(seed)
    num_drafts, depth = dice.integers(1, 5), 4
    chances = np.cumprod(dice.uniform(0.1, 1, (num_drafts, depth)), axis=1)
    num_decodes = int(num_drafts + dice.integers(0, 8))
    costs = random_costs(dice)

    def rate(depths):
        tokens = num_decodes + sum(chances[i, : depths[i]].sum() for i in range(num_drafts))
        return tokens / costs.seconds_for(num_decodes + sum(depths))

    chosen = _best_depths(chances, num_decodes, costs.rows, costs.seconds, worth_it, *all_known(num_drafts))
    best = max(map(rate, itertools.product(range(depth + 1), repeat=int(num_drafts))))
    assert share * best <= rate(chosen) <= (1 + 1e-9) * best


def test_what_promises_too_little_is_left():
    costs = StepCosts({1: 0.010, 2: 0.020, 32: 0.320})
    assert _best_depths(np.array([[0.9, 0.81]]), 1, costs.rows, costs.seconds, 1.02, *all_known(1)).tolist() == [0]


@numba.njit
def read_off_each(rows, knots, values):
    return np.array([step_costs.read_off(row, knots, values) for row in rows])


def test_compiled_code_reads_costs_off_as_numpy_does():
    rows = np.arange(0, 16)
    for length in (1, 2, 5):
        knots, values = np.array([1.0, 2.0, 7.0, 11.0, 12.0])[:length], np.array([0.3, 0.3, 0.7, 1.9, 2.0])[:length]
        np.testing.assert_allclose(read_off_each(rows, knots, values), np.interp(rows, knots, values), rtol=1e-12)


def test_costs_never_fall_with_rows_whatever_was_measured():
    costs = StepCosts({1: 0.010, 4: 0.008, 8: 0.030})
    assert costs.seconds_for(1) == costs.seconds_for(4) == pytest.approx(0.008)
    for seconds in (1e-6, 1.0, 0.5, 1e-3):
        costs.observe(8, seconds)
        assert (np.diff(costs.seconds) >= 0).all()


def test_one_step_that_was_held_up_while_it_was_measured_makes_no_other_dear():
    costs = StepCosts({1: 0.010, 2: 0.040, 4: 0.011, 8: 0.012})
    assert [costs.seconds_for(rows) for rows in (1, 2, 4, 8)] == pytest.approx([0.010, 0.011, 0.011, 0.012])


def test_costs_follow_what_steps_take_and_do_not_believe_one_that_was_held_up():
    costs = StepCosts({1: 0.010, 32: 0.040})
    costs.observe(1, 5.0)
    assert costs.seconds_for(1) < 0.0105
    for _ in range(100):
        costs.observe(1, 0.020)
    assert costs.seconds_for(1) == pytest.approx(0.020, rel=0.05)


def test_a_machine_that_is_busy_for_a_while_leaves_nothing_behind():
    costs = StepCosts({1: 0.010, 2: 0.0102, 4: 0.0105, 8: 0.0115, 16: 0.02, 32: 0.04})
    before = costs.seconds.copy()
    for seconds in [0.020] * 50 + [0.010] * 400:
        costs.observe(1, seconds)
    np.testing.assert_allclose(costs.seconds, before, rtol=0.03)


def test_what_is_seen_at_some_rows_is_believed_there_more_than_elsewhere():
    costs = StepCosts({1: 0.010, 32: 0.040})
    for _ in range(60):
        costs.observe(1, 0.010)
        costs.observe(16, 2 * 0.0245)
    assert costs.seconds_for(16) > 1.3 * 0.0245
    assert costs.seconds_for(1) < 1.3 * 0.010


class SmallRunner(ToyRunner):
    def forward(self, batch):
        if len(batch.token_ids) > 5:
            raise OutOfMemoryError("no room")
        return super().forward(batch)


def test_numbers_of_rows_that_the_device_has_no_room_for_are_not_measured():
    costs = measure_costs(SmallRunner((KVGroup("full", 4, None),), 3), (1, 4, 8, 16))
    assert costs.seconds_for(4) > 0


# ---- how much is drafted at most


def sequence_of(key, *, prompt=1, max_tokens=None, prediction=()):
    request = SimpleNamespace(prediction_token_ids=list(prediction), sampling=SimpleNamespace(max_tokens=max_tokens))
    return SimpleNamespace(key=key, request=request, token_ids=[1] * prompt, num_output_tokens=0)


def most(costs, num_decodes, max_depth=32):
    return AdaptiveDepth(StepCosts(costs), max_depth=max_depth).most(sequence_of("new"), num_decodes)


@pytest.mark.parametrize("num_decodes", [1, 16, 64])
def test_where_rows_cost_nothing_the_depth_does_not_fall_with_the_number_of_sequences(num_decodes):
    assert most({1: 0.01, 4096: 0.0101}, num_decodes) == 32


def asked_in(policy, sequences, num_steps, num_decodes=16):
    """Bools [num_steps, len(sequences)]: who is drafted for at steps of which nothing is learned, as beside a prompt."""
    return np.array([[policy.most(sequence, num_decodes) > 0 for sequence in sequences] for _ in range(num_steps)])


def test_a_sequence_that_drafts_are_in_vain_for_is_drafted_for_seldom_where_drafting_is_felt():
    costs = StepCosts({1: 0.001, 64: 0.0011, 4096: 0.01})
    policy, sequence = AdaptiveDepth(costs, max_depth=8), sequence_of("a")
    asked = asked_in(policy, [sequence], 100)[:, 0]
    assert asked[:4].all()
    assert asked[4:].nonzero()[0].tolist() == [60]
    asked_in(policy, [sequence], 29)
    assert policy.choose([sequence], [draft([0.99] * 4)], 16) == [4]
    assert policy.most(sequence, 16) > 0


def test_one_good_draft_among_many_is_verified_though_it_hardly_changes_the_whole():
    costs = StepCosts({32: 0.052, 64: 0.096})
    alone = np.array([[0.95]])
    gain = (32.95 / costs.seconds_for(33)) / (32 / costs.seconds_for(32))
    assert 1.0 < gain < 1.02
    assert _best_depths(alone, 32, costs.rows, costs.seconds, 1.02, *all_known(1)).tolist() == [0]
    cheaper = StepCosts({32: 0.052, 64: 0.086})
    assert _best_depths(alone, 32, cheaper.rows, cheaper.seconds, 1.02, *all_known(1)).tolist() == [1]


def chosen_at_first(costs, confidence, num_decodes=4):
    """Depths at the first step at which anything is drafted, and the policy."""
    policy = AdaptiveDepth(StepCosts(costs), max_depth=32)
    crowd = [sequence_of(name) for name in range(num_decodes)]
    drafts = [draft([confidence] * 32) for _ in crowd]
    return sum(policy.choose(crowd, drafts, num_decodes)), policy, crowd, drafts


def test_drafts_that_nothing_is_known_of_are_tried_for_a_quarter_of_a_step_whatever_they_promise():
    dear = {1: 0.010, 4: 0.040, 64: 0.640}  # each row a quarter of a step of four
    tried, policy, crowd, drafts = chosen_at_first(dear, 0.01)
    assert tried == 1
    for _ in range(8):
        policy.learn(crowd[0], drafts[0], np.array([49], np.int32))
    assert policy.choose(crowd, drafts, 4) == [0] * 4
    assert chosen_at_first({1: 0.010, 4: 0.040, 64: 0.0499}, 0.01)[0] >= 60
    assert chosen_at_first({1: 0.010, 4: 0.040, 5: 0.052, 64: 0.9}, 0.01)[0] == 0


def test_however_much_they_promise_they_take_no_longer_than_the_step_until_something_is_known():
    twice = {1: 0.010, 4: 0.011, 12: 0.020, 13: 0.023, 64: 0.030, 132: 0.040}
    tried, policy, crowd, drafts = chosen_at_first(twice, 0.99)
    assert tried == 8
    for one, each in zip(crowd, drafts):
        policy.learn(one, each, np.array([*range(3), 49], np.int32)[:3])
    assert sum(policy.choose(crowd, drafts, 4)) > 60


def chosen_beside_one_in_vain(costs, confidence, num_new=4):
    """Depths of new drafts, of a source of which nothing is known, beside a draft that is known to be in vain."""
    policy = AdaptiveDepth(StepCosts(costs), max_depth=32)
    crowd = [sequence_of(name) for name in range(1 + num_new)]
    vain = draft([0.9] * 32)
    for _ in range(40):
        policy.learn(crowd[0], vain, np.array([49], np.int32))
    drafts = [vain] + [draft([confidence] * 32, source="model") for _ in range(num_new)]
    known, *new = policy.choose(crowd, drafts, len(crowd))
    assert known <= 1
    return new


def test_a_new_source_is_bounded_and_tried_alike_whatever_is_known_of_another_in_the_same_step():
    twice = {1: 0.010, 5: 0.011, 13: 0.022, 14: 0.025, 64: 0.030, 165: 0.040}
    assert 0 < sum(chosen_beside_one_in_vain(twice, 0.99)) <= 8
    dear = {1: 0.010, 5: 0.050, 64: 0.640}  # each row a fifth of a step of five
    assert sum(chosen_beside_one_in_vain(dear, 0.01)) == 1


def test_what_is_known_is_not_bounded_for_the_sake_of_a_new_source_beside_it():
    policy = AdaptiveDepth(StepCosts({1: 0.010, 2: 0.011, 6: 0.021, 7: 0.023, 64: 0.030}), max_depth=32)
    good, new = sequence_of("good"), sequence_of("new")
    right = draft([0.99] * 32)
    for _ in range(20):
        policy.learn(good, right, np.arange(32, dtype=np.int32))
    known, tried = policy.choose([good, new], [right, draft([0.99] * 32, source="model")], 2)
    assert known == 32
    assert 0 < tried <= 5


def test_who_comes_while_drafts_are_in_vain_for_all_has_one_try():
    policy = AdaptiveDepth(StepCosts({1: 0.001, 64: 0.0011, 4096: 0.01}), max_depth=8)
    early, late, later = sequence_of("early"), sequence_of("late"), sequence_of("later")
    first = asked_in(policy, [early], 20)[:, 0]
    assert first[:4].all()
    assert not first[4:8].any()
    assert asked_in(policy, [early, late], 4)[:, 1].sum() <= 2
    policy.choose([early], [draft([0.99] * 8)], 1)  # now they pay for one
    assert asked_in(policy, [early, later], 4)[:, 1].sum() == 3  # as many as the one there has left


def test_where_little_can_be_won_little_is_tried():
    costs = StepCosts({1: 0.01, 16: 0.16, 32: 0.28})
    asked = asked_in(AdaptiveDepth(costs, max_depth=8), [sequence_of("a")], 100)[:, 0]
    assert asked[:2].tolist() == [True, False]
    assert 20 < asked.sum() < 40


def test_sequences_that_drafts_are_in_vain_for_are_tried_together_whenever_they_came():
    costs = StepCosts({1: 0.001, 64: 0.0011, 4096: 0.01})
    policy, early, late = AdaptiveDepth(costs, max_depth=8), sequence_of("early"), sequence_of("late")
    asked_in(policy, [early], 30)
    asked = asked_in(policy, [early, late], 400)[60:]
    assert (asked[:, 0] == asked[:, 1]).all()
    assert 3 < asked[:, 0].sum() < 8


def test_a_long_prompt_is_read_for_drafts_only_where_that_may_pay():
    dear, cheap = StepCosts({1: 0.01, 16: 0.16, 32: 0.3}), StepCosts({1: 0.01, 64: 0.011})
    for costs, num_decodes, expected in ((dear, 16, False), (cheap, 1, True)):
        policy = AdaptiveDepth(costs, max_depth=8)
        assert (policy.most(sequence_of("long", prompt=20_000), num_decodes) > 0) is expected
        assert policy.most(sequence_of("short", prompt=10), num_decodes)
        assert not policy.most(sequence_of("ends", prompt=20_000, max_tokens=1), num_decodes)
        assert policy.most(sequence_of("predicted", prompt=20_000, prediction=[1, 2]), num_decodes)


def test_how_seldom_is_seen_from_what_drafting_takes():
    costs = StepCosts({1: 0.001, 64: 0.0011, 4096: 0.01})
    policy = AdaptiveDepth(costs, max_depth=8)
    for _ in range(200):
        policy.observe_drafting(16, 16 * 1e-6)
    policy.observe_drafting(16, 1.0)  # held up
    asked = asked_in(policy, [sequence_of("a")], 100)[:, 0]
    assert asked[:4].all()
    assert (np.diff(asked[4:].nonzero()[0]) == 4).all()
    assert asked.sum() > 20


def test_steps_in_which_a_drafter_only_read_are_not_held_against_it():
    policy = AdaptiveDepth(StepCosts({1: 0.001, 64: 0.0011, 4096: 0.01}), max_depth=8)
    sequence = sequence_of("a")
    for _ in range(50):
        assert policy.most(sequence, 16) > 0
        policy.excuse(sequence)
    asked = [policy.most(sequence, 16) > 0 for _ in range(30)]
    assert asked[:4] == [True] * 4
    assert sum(asked[4:]) < 3


def test_where_steps_are_long_every_step_may_draft():
    policy = AdaptiveDepth(StepCosts({1: 0.03, 64: 0.031, 4096: 0.04}), max_depth=8)
    assert all(policy.most(sequence_of("a"), 4) for _ in range(100))


def test_numbers_of_rows_behind_which_costs_are_in_proportion_are_not_measured(monkeypatch):
    passed = [0.0]

    class Proportional(ToyRunner):
        def forward(self, batch):
            passed[0] += 0.001 * len(batch.token_ids)
            return super().forward(batch)

    monkeypatch.setattr(step_costs, "perf_counter", lambda: passed[0])

    runner = Proportional((KVGroup("full", 4, None),), 3)
    costs = measure_costs(runner, (1, 16, 32, 64, 128, 256))
    assert max(len(batch.token_ids) for batch in runner.batches) == 64
    assert costs.seconds_for(4096) == pytest.approx(4.096)


def test_a_step_to_another_tile_is_learned_where_it_is():
    tiles = StepCosts({1: 0.010, 64: 0.012})
    for _ in range(60):
        tiles.observe(8, 0.010)
        tiles.observe(9, 0.015)
    assert tiles.seconds_for(9) > 1.3 * tiles.seconds_for(8)


def test_it_is_soon_found_that_confidence_means_nothing():
    model, dice = AcceptanceModel(), np.random.default_rng(0)
    for number in range(60):
        model.learn(f"s{number}", draft([dice.uniform(0.3, 1.0)]), np.array([0 if number % 2 else 7], np.int32))
    sure, unsure = (chances(model, [draft([confidence])], "new")[0, 0] for confidence in (0.95, 0.4))
    assert sure - unsure < 0.35


@pytest.mark.parametrize("num_decodes", [1, 4, 16, 49, 50, 64, 96])
def test_where_rows_cost_nothing_everybody_may_draft_however_many_there_are(num_decodes):
    assert most({1: 0.01, 4096: 0.0101}, num_decodes) >= 1


@pytest.mark.parametrize("num_decodes", [1, 4, 16, 64])
def test_where_rows_cost_more_and_more_nobody_may(num_decodes):
    assert most({rows: 0.01 * rows**1.3 for rows in (1, 2, 4, 8, 16, 32, 64, 256, 1024)}, num_decodes) == 0


def test_a_depth_that_pays_is_found_where_deeper_ones_do_not():
    assert most({1: 0.010, 8: 0.012, 16: 0.050, 64: 0.5}, 1) > 0


def test_a_sequence_that_drafts_fail_for_has_less_room_reserved():
    policy = AdaptiveDepth(StepCosts({1: 0.01, 64: 0.0101}), max_depth=32)
    sequence = sequence_of("a")
    before = policy.most(sequence, 1)
    for _ in range(40):
        policy.learn(sequence, draft([0.9]), np.array([7], np.int32))
    assert policy.most(sequence, 1) < before / 3


def test_a_least_depth_is_verified_whether_it_pays_or_not():
    dear = StepCosts({rows: 0.01 * rows**1.5 for rows in (1, 2, 4, 8, 16, 32)})
    policy = AdaptiveDepth(dear, max_depth=4, min_depth=2)
    assert policy.most(sequence_of("a"), 1) == 4
    drafts = [draft([0.1, 0.1, 0.1]), draft([0.1])]
    assert policy.choose([sequence_of("a"), sequence_of("b")], drafts, 2) == [2, 1]


def test_costs_beyond_the_table_go_on_in_proportion():
    costs = StepCosts({1: 0.01, 64: 0.1})
    assert costs.seconds_for(640) == pytest.approx(1.0)
    assert costs.seconds_for(64_000) == pytest.approx(100.0)


def test_the_costs_of_a_model_are_measured_over_its_pages():
    runner = ToyRunner((KVGroup("full", 4, None), KVGroup("window", 6, 5)), 3)
    costs = measure_costs(runner, (1, 4))
    assert costs.seconds_for(1) > 0
    assert {len(batch.token_ids) for batch in runner.batches} == {1, 4}


# ---- acceptance


def chances(model, drafts, key="a"):
    return model.probabilities([key] * len(drafts), drafts)


def test_before_anything_is_known_a_drafter_is_believed():
    ((first, second),) = chances(AcceptanceModel(), [draft([0.9, 0.9])])
    assert first == pytest.approx(0.9, abs=0.06)
    assert second == pytest.approx(first * first, abs=0.06)


def test_a_drafter_that_is_too_sure_is_believed_less_and_less():
    model = AcceptanceModel()
    for number in range(400):
        # Says 0.95, is right every other time.
        model.learn(f"s{number}", draft([0.95]), np.array([0 if number % 2 else 7], np.int32))
    assert chances(model, [draft([0.95])])[0, 0] == pytest.approx(0.5, abs=0.08)
    assert chances(model, [draft([0.95], source="other")])[0, 0] > 0.9


def test_a_sequence_that_drafts_fail_for_is_told_from_one_that_they_suit():
    model = AcceptanceModel()
    for _ in range(40):
        model.learn("good", draft([0.7]), np.array([0], np.int32))
        model.learn("bad", draft([0.7]), np.array([9], np.int32))
    good, bad = (chances(model, [draft([0.7])], key)[0, 0] for key in ("good", "bad"))
    assert good > 3 * bad
    assert model.reach("good") > model.reach("bad")


def test_drafts_that_were_not_verified_teach_as_far_as_the_target_spoke():
    model = AcceptanceModel()
    before = chances(model, [draft([0.5, 0.5])])[0, 0]
    for _ in range(50):
        model.learn("a", draft([0.5, 0.5]), np.array([0], np.int32))  # depth 0: the plain token agrees
    after = chances(model, [draft([0.5, 0.5])])[0]
    assert after[0] > before + 0.2
    assert math.isclose(after[1] / after[0], before, abs_tol=0.1)


def test_what_ended_is_forgotten():
    model = AcceptanceModel()
    model.learn("a", draft([0.5]), np.array([0], np.int32))
    model.forget("a")
    assert not model._records


def test_drafts_of_all_lengths_are_judged_together():
    judged = chances(AcceptanceModel(), [draft([0.9]), draft([0.9, 0.9, 0.9]), draft([0.1, 0.2])])
    assert judged.shape == (3, 3)
    assert (judged > 0).sum(axis=1).tolist() == [1, 3, 2]
    assert (np.diff(judged, axis=1) <= 0).all()
