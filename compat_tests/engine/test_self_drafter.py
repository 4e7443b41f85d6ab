"""The target at fewer bits drafts over the target's own pages: the answers are the target's, and nothing is left behind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_tests.effort import deeply
from compat_tests.engine.speculation_cases import OPTIONS, as_told, draw_crowd, draw_policies, wanted_of, wanted_of_all
from compat_tests.engine.test_constraints import Pattern
from compat_tests.engine.toy import ONE_GROUP, TWO_GROUPS, Answers, ToyRunner, drain, make_engine, request
from helix_gateway.engine.acceptance import AcceptanceModel
from helix_gateway.engine.depth import AdaptiveDepth, FixedDepth
from helix_gateway.engine.drafters.chain import CostlyDrafter
from helix_gateway.engine.drafters.self_drafter import SelfDrafter
from helix_gateway.engine.drafters.suffix import SuffixDrafter
from helix_gateway.engine.drafting import SELF, AdaptiveDrafting, AlwaysDrafting
from helix_gateway.engine.engine import ChoiceHooks
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.step_costs import StepCosts

OWN = 1000
"""Added to what it writes: the target would answer otherwise if it ever read that."""


class Rounded(ToyRunner):
    """Right, and writes keys and values of its own that only it reads as the target's."""

    def _write(self, batch, s, row):
        super()._write(batch, s, row)
        position = batch.positions[row]
        for group, table in zip(self.kv_groups, batch.block_tables, strict=True):
            entry, offset = divmod(position, group.tokens_per_block)
            self.pages[table[s, entry], offset] += OWN

    def _logits(self, batch, s, row):
        pages, self.pages = self.pages, self.pages % OWN
        try:
            return super()._logits(batch, s, row)
        finally:
            self.pages = pages


class Blurred(Rounded):
    """Right now and then."""

    def _logits(self, batch, s, row):
        exact = super()._logits(batch, s, row)
        return exact + np.random.default_rng(int(abs(exact[0]) * 1e6)).normal(0, 1.5, len(exact))


class Opposite(Rounded):
    """The least likely token for the likeliest."""

    def _logits(self, batch, s, row):
        return -super()._logits(batch, s, row)


RUNNERS = {"right": Rounded, "by chance": Blurred, "opposite": Opposite}


def engine_with_self(
    runner_kind=Rounded, groups=ONE_GROUP, num_pages=200, *, drafting=None, depth_policy=None, caching=True, **options
):
    """An engine, and the runner that drafts for it; the cache is checked before every forward of either."""
    target, own = ToyRunner(groups, num_pages), runner_kind(groups, num_pages)
    own.pages = target.pages
    cache = PagedKVCache(groups, num_pages, enable_prefix_caching=caching)
    drafting = drafting or AlwaysDrafting()
    drafter = SelfDrafter(own, cache, drafting)
    compute = drafter._compute

    def check_and_compute(parts):
        cache.check(writes=[(p.draft.key, p.start, p.start + len(p.token_ids)) for p in parts])
        compute(parts)

    drafter._compute = check_and_compute
    engine = make_engine(
        runner=target,
        cache=cache,
        costly_drafter=CostlyDrafter(drafter, drafting),
        depth_policy=depth_policy or FixedDepth(4),
        **options,
    )
    return engine, own


def answers_of(engine, requests, hooks=()):
    for each in requests:
        engine.submit(each, hooks)
    answers = drain(engine)
    assert engine.cache.pool.num_referenced == 0
    return answers


def asked(option, name="r"):
    return request(name, [5, 6, 7, 8] * 3, seed=7, **{"temperature": 1.0, "max_tokens": 25, **OPTIONS[option]})


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("groups", [ONE_GROUP, TWO_GROUPS], ids=["one group", "a window too"])
def test_every_option_gives_the_same_tokens(kind, option, groups):
    each = asked(option)
    engine, _ = engine_with_self(RUNNERS[kind], groups, budget=64)
    assert as_told(answers_of(engine, [each])) == wanted_of(each, groups)


@pytest.mark.parametrize("option", OPTIONS)
def test_weights_that_are_right_are_right_with_every_option(option):
    """At any temperature and with any penalty: drawn with the request's own noise, at the very position."""
    engine, _ = engine_with_self(budget=64)
    for answer in answers_of(engine, [asked(option)]).values():
        metrics = answer.last.metrics
        # What was drafted behind a stop is not counted as accepted.
        assert metrics.accepted_tokens >= metrics.draft_tokens - 4
        assert metrics.accepted_tokens >= 0.6 * metrics.output_tokens or metrics.output_tokens < 6


def test_a_constraint_is_kept_to_while_drafting():
    engine, _ = engine_with_self(budget=64)
    each = request("r", [5, 6, 7], max_tokens=24, seed=3, temperature=1.0)
    (answer,) = answers_of(engine, [each], [ChoiceHooks(constraint=Pattern())]).values()
    plain = make_engine()
    plain.submit(each, [ChoiceHooks(constraint=Pattern())])
    assert [answer.token_ids] == [wanted.token_ids for wanted in drain(plain).values()]
    # The end of the text was drafted too, and is no token of the answer.
    assert answer.last.metrics.accepted_tokens == answer.last.metrics.draft_tokens - 1 >= 7


@settings(max_examples=deeply(40, 800), deadline=None)
@given(st.data())
def test_a_crowd_with_little_memory_gets_what_each_gets_alone(data):
    """With prefixes found, prompts in chunks and sequences preempted."""
    requests = draw_crowd(data.draw)
    policy, drafting = draw_policies(data.draw, SELF)
    groups = data.draw(st.sampled_from([ONE_GROUP, TWO_GROUPS]))
    engine, _ = engine_with_self(
        RUNNERS[data.draw(st.sampled_from(list(RUNNERS)))],
        groups,
        data.draw(st.integers(34, 80)),  # at least what the longest needs
        depth_policy=policy,
        drafting=drafting,
        drafter=SuffixDrafter() if data.draw(st.booleans()) else None,
        budget=data.draw(st.integers(4, 40)),
        caching=data.draw(st.booleans()),
    )
    assert as_told(answers_of(engine, requests)) == wanted_of_all(requests, groups)


def test_each_draft_position_is_one_forward_of_a_row_for_each():
    engine, own = engine_with_self(budget=64, depth_policy=FixedDepth(3))
    for i in range(4):
        engine.submit(request(f"r{i}", [i + 1, 2, 3], max_tokens=20, ignore_eos=True))
    engine.step()
    assert not own.batches  # nothing is drafted before the target has read the prompts
    engine.step()
    assert [len(batch.token_ids) for batch in own.batches] == [4, 4, 4]
    assert [batch.positions.tolist() for batch in own.batches] == [[3] * 4, [4] * 4, [5] * 4]
    assert [output.num_accepted for output in engine.last_output.step.outputs] == [3] * 4


def test_who_is_found_in_the_cache_whole_is_drafted_for_at_once_and_the_shared_block_stays_as_it_is():
    engine, own = engine_with_self(budget=64)
    first = answers_of(engine, [request("first", range(1, 17), seed=1, max_tokens=12, ignore_eos=True)])
    own.batches.clear()
    engine.submit(request("again", range(1, 17), seed=1, max_tokens=12, ignore_eos=True))
    again = Answers()
    again.take(engine.step())
    assert own.batches
    drain(engine, again)
    assert again["again", 0].token_ids == first["first", 0].token_ids
    third = answers_of(engine, [request("third", range(1, 17), seed=1, max_tokens=12, ignore_eos=True)])
    assert third["third", 0].token_ids == first["first", 0].token_ids


def test_choices_of_one_request_share_the_prompt_and_draft_each_into_blocks_of_its_own():
    engine, own = engine_with_self(budget=64)
    each = request("r", range(1, 14), n=4, seed=5, temperature=1.0, max_tokens=20, ignore_eos=True)
    assert as_told(answers_of(engine, [each])) == wanted_of(each)
    assert max(len(batch.token_ids) for batch in own.batches) == 4


class Failing(Rounded):
    """Fails at its third forward, and at each later one."""

    def forward(self, batch):
        logits = super().forward(batch)  # what it wrote stays
        if len(self.batches) >= 3:
            raise ValueError("no reason")
        return logits


def test_a_drafter_that_fails_costs_drafts_and_nothing_else(capsys):
    engine, own = engine_with_self(Failing, budget=64)
    requests = [request(f"r{i}", [i + 1, 2, 3], seed=i, max_tokens=20, ignore_eos=True) for i in range(2)]
    got = as_told(answers_of(engine, requests))
    assert got == {**wanted_of(requests[0]), **wanted_of(requests[1])}
    assert capsys.readouterr().out.count("drafter_switched_off") == 2
    assert len(own.batches) <= 5


def test_a_drafter_that_joins_between_two_steps_drafts_for_who_is_there_already():
    engine, _ = engine_with_self(budget=64, depth_policy=FixedDepth(3))
    plain = make_engine(runner=engine._decoder._runner, cache=engine.cache, depth_policy=FixedDepth(3), budget=64)
    each = request("r", [1, 2, 3], seed=2, temperature=1.0, max_tokens=20, ignore_eos=True)
    plain.submit(each)
    for _ in range(4):
        plain.step()
    assert plain.last_output.num_draft_tokens == 0
    own = Rounded(ONE_GROUP, 200)
    own.pages = plain._decoder._runner.pages
    plain.join(CostlyDrafter(SelfDrafter(own, plain.cache, AlwaysDrafting()), AlwaysDrafting()))
    plain.step()
    assert plain.last_output.num_accepted_draft_tokens == 3
    rest = drain(plain)["r", 0]
    assert rest.token_ids == wanted_of(each)["r", 0][0][-len(rest.token_ids) :]


def test_what_is_drafted_is_counted_under_its_name():
    engine, _ = engine_with_self(budget=64)
    answers_of(engine, [request("r", [1, 2, 3], max_tokens=20, ignore_eos=True)])
    assert set(engine.stats().drafts) == {SELF}


FLOAT32 = {1: 0.0150, 2: 0.0165, 4: 0.0176, 8: 0.0183, 16: 0.0251, 32: 0.0483, 64: 0.0947}
FOUR_BITS = {1: 0.0034, 2: 0.0034, 4: 0.0039, 8: 0.0051, 16: 0.0092, 32: 0.0185, 64: 0.0357}
"""Seconds of SmolLM2's steps by rows, on a busy machine of two cores."""


def left_to_itself(**options):
    """An engine whose policies go by those costs, and the drafter's forwards."""
    acceptance = AcceptanceModel()
    costs = StepCosts(FLOAT32)
    policy = AdaptiveDepth(costs, max_depth=32, acceptance=acceptance)
    drafting = AdaptiveDrafting(costs, StepCosts(FOUR_BITS), acceptance, source=SELF)
    policy.observe = drafting.observe = lambda *_: None  # the toy's own time says nothing
    return engine_with_self(depth_policy=policy, drafting=drafting, budget=256, num_pages=1000, **options)


def test_drafts_that_are_right_become_long_for_one_stream():
    engine, _ = left_to_itself()
    (answer,) = answers_of(engine, [request("r", [1, 2, 3], max_tokens=150, ignore_eos=True)]).values()
    steps = answer.last.metrics.output_tokens - answer.last.metrics.accepted_tokens
    assert steps <= 150 / 7


def test_beside_many_streams_drafts_do_not_pay_and_none_is_made():
    engine, own = left_to_itself(max_num_seqs=16)
    answers_of(engine, [request(f"r{i}", [i, 2, 3], max_tokens=40, ignore_eos=True) for i in range(16)])
    assert not own.batches
