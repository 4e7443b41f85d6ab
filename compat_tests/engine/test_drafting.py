"""When a draft model is asked, against trying all that could be asked; what it is asked again after, and what that takes."""

import itertools
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from compat_tests.engine.test_depth import draft
from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.engine.acceptance import AcceptanceModel
from helix_gateway.engine.drafters.base import NOTHING
from helix_gateway.engine.drafting import MODEL, AdaptiveDrafting, _plan_drafting
from helix_gateway.engine.step_costs import StepCosts

TARGET = {1: 0.025, 8: 0.027, 16: 0.035, 64: 0.1}


def sequence(key="a", num_output_tokens=20, max_tokens=None):
    request = Request(request_id=str(key), prompt_token_ids=[1], sampling=SamplingParams(max_tokens=max_tokens))
    return SimpleNamespace(key=key, request=request, num_output_tokens=num_output_tokens)


def plan(free, foreseen, num_decodes, costs, draft_costs, worth_it=1.0):
    return _plan_drafting(
        free, foreseen, num_decodes, costs.rows, costs.seconds, draft_costs.rows, draft_costs.seconds, worth_it
    )


def best_rate_of_all(free, foreseen, num_decodes, costs, draft_costs):
    """Every choice of who has costly drafts, and how deep each goes."""
    num_seqs, best = len(free), 0.0
    for costly in itertools.product([False, True], repeat=num_seqs):
        rows = [foreseen[i] if costly[i] else free[i] for i in range(num_seqs)]
        for depths in itertools.product(*(range(len(row) + 1) for row in rows)):
            tokens = num_decodes + sum(row[:depth].sum() for row, depth in zip(rows, depths))
            drafted = [depth for depth, paid in zip(depths, costly) if paid]
            levels = [sum(depth > level for depth in drafted) for level in range(max(drafted, default=0))]
            seconds = costs.seconds_for(num_decodes + sum(depths)) + sum(map(draft_costs.seconds_for, levels))
            best = max(best, tokens / seconds)
    return best


def shares(seed):
    dice = np.random.default_rng(seed)
    num_seqs, depth = int(dice.integers(1, 4)), 3
    free = np.cumprod(dice.uniform(0, 0.9, (num_seqs, depth)), axis=1)
    free[dice.uniform(size=num_seqs) < 0.5] = 0.0
    foreseen = np.cumprod(np.repeat(dice.uniform(0.2, 0.98, (num_seqs, 1)), depth, axis=1), axis=1)
    num_decodes = int(num_seqs + dice.integers(0, 4))
    growing = np.cumsum(dice.uniform(0, 1, 4)) * dice.uniform(0.001, 0.05)
    costs = StepCosts(dict(zip((1, 4, 8, 32), 0.02 + growing)))
    fraction = dice.uniform(0.02, 0.8)
    draft_costs = StepCosts(dict(zip((1, 4, 8, 32), fraction * (0.02 + growing))))
    chosen = plan(free, foreseen, num_decodes, costs, draft_costs)
    return chosen[1] / best_rate_of_all(free, foreseen, num_decodes, costs, draft_costs)


def test_what_is_asked_for_is_nearly_the_best_of_all_there_is():
    reached = np.array([shares(seed) for seed in range(150)])
    print(f"mean {reached.mean():.4f}, least {reached.min():.4f}")
    assert (reached <= 1 + 1e-9).all()
    assert reached.mean() > 0.995
    assert reached.min() > 0.98


@pytest.mark.parametrize("num_decodes", [1, 4, 16])
def test_a_draft_model_as_dear_as_its_target_is_never_asked_however_right(num_decodes):
    costs, foreseen = StepCosts(TARGET), np.full((num_decodes, 8), 0.99) ** np.arange(1, 9)
    depths, rate, without, _ = plan(np.zeros((num_decodes, 0)), foreseen, num_decodes, costs, costs, 1.02)
    assert not depths.any()
    assert rate == without


def test_what_is_free_is_not_paid_for():
    costs, draft_costs = StepCosts(TARGET), StepCosts({1: 0.0005, 64: 0.005})
    chances = np.full((2, 8), 0.9) ** np.arange(1, 9)
    free = np.array([[0.95**place for place in range(1, 9)], [0.0] * 8])
    depths, *_ = plan(free, chances, 2, costs, draft_costs, 1.02)
    assert depths[0] == 0
    assert depths[1] > 1


def adaptive(draft_s=0.004, **options):
    acceptance = AcceptanceModel()
    return (
        AdaptiveDrafting(StepCosts(TARGET), StepCosts({1: draft_s, 64: 4 * draft_s}), acceptance, **options),
        acceptance,
    )


def test_a_drafter_that_is_wrong_is_left_alone_and_tried_again_one_day():
    drafting, acceptance = adaptive()
    assert drafting.ask([sequence()], [NOTHING], [8], 1)[0] > 0
    for number in range(60):
        acceptance.learn(number, draft([0.9], source=MODEL), np.array([7], np.int32))
    asked = [drafting.ask([sequence()], [NOTHING], [8], 1)[0] for _ in range(10_000)]
    assert not any(asked[:500])
    assert any(asked)
    assert sum(depth > 0 for depth in asked[: np.flatnonzero(asked)[0] + 1]) == 1


def test_a_drafter_that_was_measured_too_dear_is_looked_at_now_and_then_and_asked_once_it_is_seen_to_be_cheap():
    drafting, _ = adaptive(draft_s=0.03)
    asked, forwards = [], 0
    for _ in range(20_000):
        (depth,) = drafting.ask([sequence()], [NOTHING], [8], 1)
        asked.append(depth)
        if depth and drafting.goes_on([sequence()], [NOTHING])[0]:
            drafting.observe(1, 0.004)
            forwards += 1
    first = np.flatnonzero(asked)
    assert np.diff(first)[0] == first[0] + 1 == 400
    assert asked[first[0]] == 1
    assert all(depth > 1 for depth in asked[-100:])
    assert forwards == np.count_nonzero(asked)


def test_one_sequence_that_drafts_suit_is_asked_for_where_another_is_not():
    acceptance = AcceptanceModel()
    # A draft model that computes one row at a time.
    drafting = AdaptiveDrafting(StepCosts(TARGET), StepCosts({1: 0.006, 2: 0.012, 64: 0.4}), acceptance)
    for _ in range(60):
        acceptance.learn("good", draft([0.8], source=MODEL), np.array([0], np.int32))
        acceptance.learn("bad", draft([0.8], source=MODEL), np.array([7], np.int32))
    good, bad = drafting.ask([sequence("good"), sequence("bad")], [NOTHING, NOTHING], [8, 8], 2)
    assert good > 0
    assert bad == 0


@pytest.mark.parametrize("num_others", [0, 3, 15])
def test_who_cannot_be_drafted_for_is_in_the_costs_of_the_plan_only(num_others):
    """As one that gets a token beside: what is expected of the step, and what is asked for the others, is the same."""
    one, other = adaptive()[0], adaptive()[0]
    others, rows = [sequence(number) for number in range(num_others)], num_others + 1
    depths = one.ask([sequence(), *others], [NOTHING] * rows, [8] + [0] * num_others, rows)
    assert depths[1:] == [0] * num_others
    assert depths[:1] == other.ask([sequence()], [NOTHING], [8], rows)
    assert (one._rate, one._saved_s, one._num_rows) == (other._rate, other._saved_s, other._num_rows)


def test_where_nobody_can_be_drafted_for_nothing_is_asked_nor_forgotten():
    drafting, acceptance = adaptive()
    acceptance.learn("a", draft([0.9], source=MODEL), np.array([7], np.int32))
    before = acceptance.foreseen(MODEL, ["a"], 4)
    assert drafting.ask([sequence(), sequence("b")], [NOTHING, NOTHING], [0, 0], 2) == [0, 0]
    assert (acceptance.foreseen(MODEL, ["a"], 4) == before).all()


def test_drafting_ends_where_the_drafter_is_unsure():
    drafting, acceptance = adaptive()
    for number in range(200):
        acceptance.learn(number, draft([0.97, 0.97], source=MODEL), np.array([0, 1], np.int32))
        acceptance.learn(-number, draft([0.1], source=MODEL), np.array([7], np.int32))
    drafting.ask([sequence("x"), sequence("y")], [NOTHING, NOTHING], [8, 8], 2)
    drafts = [draft([0.97], source=MODEL), draft([0.1], source=MODEL)]
    assert drafting.goes_on([sequence("x"), sequence("y")], drafts) == [True, False]
    assert drafting.goes_on([sequence("y")], drafts[1:]) == [False]


def test_a_long_prompt_is_read_for_a_long_answer_only():
    drafting, _ = adaptive()
    drafting.ask([sequence()], [NOTHING], [8], 1)
    assert drafting.worth_catching_up(sequence(num_output_tokens=0, max_tokens=50), 100)
    assert not drafting.worth_catching_up(sequence(num_output_tokens=48, max_tokens=50), 100)
    assert not drafting.worth_catching_up(sequence(), 100_000)


def test_a_least_depth_is_drafted_whether_it_pays_or_not():
    drafting, _ = adaptive(draft_s=0.5, min_depth=2)
    drafting.ask([sequence()], [NOTHING], [8], 1)
    assert drafting.ask([sequence("a"), sequence("b")], [NOTHING, draft([0.1, 0.1])], [8, 8], 2) == [2, 0]
    assert drafting.goes_on([sequence("a")], [draft([0.01], source=MODEL)]) == [True]
    assert drafting.worth_catching_up(sequence(), 10**6)


def test_costs_of_drafts_are_learned():
    drafting, _ = adaptive()
    assert drafting.ask([sequence()], [NOTHING], [8], 1)[0] > 0
    for _ in range(100):
        drafting.observe(1, 0.1)
    assert drafting.ask([sequence()], [NOTHING], [8], 1) == [0]


def test_asking_takes_few_calls():
    """Planned once, and looked at again before each of four forwards: time is a benchmark's affair, calls can be counted."""
    drafting, _ = adaptive()
    sequences = [sequence(i) for i in range(16)]
    free = [draft([0.5] * 4) for _ in sequences]
    sure = [draft([0.9, 0.9], source=MODEL) for _ in sequences]

    def ask():
        drafting.ask(sequences, free, [8] * 16, 16)
        for _ in range(4):
            drafting.goes_on(sequences, sure)
        drafting.better(sequences, sure, free)

    ask()  # what is compiled or looked up once
    events = Counter()
    sys.setprofile(lambda frame, event, argument: events.update([event]))
    try:
        ask()
    finally:
        sys.setprofile(None)
    print(events)
    assert events["call"] + events["c_call"] < 1_600  # 1,320 as this was written
