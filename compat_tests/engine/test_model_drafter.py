"""A second model drafts: the answers are the target's own, and its memory is nobody else's trouble."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_tests.effort import deeply
from compat_tests.engine.speculation_cases import (
    OPTIONS,
    as_told,
    draw_crowd,
    draw_policies,
    wanted_of,
    wanted_of_all,
)
from compat_tests.engine.toy import ONE_GROUP, TWO_GROUPS, VOCAB, ToyRunner, alone, drain, make_engine, request
from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.core.kv import KVGroup
from helix_gateway.engine.acceptance import AcceptanceModel
from helix_gateway.engine.depth import AdaptiveDepth, FixedDepth
from helix_gateway.engine.drafters.chain import CostlyDrafter
from helix_gateway.engine.drafters.model import ModelDrafter
from helix_gateway.engine.drafters.same_vocabulary import SameTokens, SameVocabulary
from helix_gateway.engine.drafters.suffix import SuffixDrafter
from helix_gateway.engine.drafting import MODEL, AdaptiveDrafting, AlwaysDrafting
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.step_costs import StepCosts

DRAFT_GROUPS = {
    "alike": (KVGroup("draft/full", 4, None),),
    "coarse": (KVGroup("draft/full", 7, None),),
    "windowed": (KVGroup("draft/full", 6, None), KVGroup("draft/window", 3, 5)),
}


class Recorded(AlwaysDrafting):
    """Remembers what it was told can be drafted: depths by request, for each step."""

    def __init__(self):
        self.told = []

    def ask(self, sequences, drafts, depths, num_decodes):
        self.told.append({s.request.request_id: depth for s, depth in zip(sequences, depths, strict=True)})
        return super().ask(sequences, drafts, depths, num_decodes)


class Opposite(ToyRunner):
    """The least likely token for the likeliest."""

    def _logits(self, batch, s, row):
        return -super()._logits(batch, s, row)


class Blurred(ToyRunner):
    """Right now and then."""

    def _logits(self, batch, s, row):
        exact = super()._logits(batch, s, row)
        return exact + np.random.default_rng(int(abs(exact[0]) * 1e6)).normal(0, 1.5, len(exact))


class WrongOfEveryFifth(ToyRunner):
    """Right, but for the token behind every fifth."""

    def _logits(self, batch, s, row):
        exact = super()._logits(batch, s, row)
        return -exact if batch.positions[row] % 5 == 4 else exact


class Forgetful(ToyRunner):
    """Says what the last token alone says, so that what was read before it changes nothing."""

    def _logits(self, batch, s, row):
        return np.random.default_rng(batch.token_ids[row]).normal(0, 1, self.vocab_size)


class Lacking(SameVocabulary):
    """A draft model that has every token but one, which it does not hear of."""

    def begin(self):
        return LackingTokens(VOCAB)


class LackingTokens(SameTokens):
    def extend(self, token_ids):
        return super().extend([token for token in token_ids if token != 49])


class Heard(SameVocabulary):
    """Remembers how many tokens each sequence was told at a time."""

    def __init__(self):
        super().__init__(VOCAB, VOCAB)
        self.told = []

    def begin(self):
        tokens = HeardTokens(VOCAB)
        tokens.told = self.told
        return tokens


class HeardTokens(SameTokens):
    def extend(self, token_ids):
        self.told.append(len(token_ids))
        return super().extend(token_ids)


RUNNERS = {"right": ToyRunner, "opposite": Opposite, "by chance": Blurred}


def engine_with_draft_model(
    runner_kind=ToyRunner,
    draft_groups=DRAFT_GROUPS["alike"],
    groups=ONE_GROUP,
    num_pages=200,
    depth_policy=None,
    drafting=None,
    catch_up_tokens=16,
    read_tokens=500,
    draft_vocab_size=VOCAB,
    context_length=1000,
    translation=None,
    target_kind=ToyRunner,
    **options,
):
    target, draft = target_kind(groups, num_pages), runner_kind(draft_groups, num_pages, draft_vocab_size)
    # One arena: what one model writes over the other's pages would show.
    size = max(group.tokens_per_block for group in (*groups, *draft_groups))
    target.pages = draft.pages = np.full((num_pages, size), -1, np.int64)
    cache = PagedKVCache((*groups, *draft_groups), num_pages, enable_prefix_caching=options.pop("caching", True))
    drafting = drafting or AlwaysDrafting()
    drafter = ModelDrafter(
        draft,
        cache,
        drafting,
        target_vocab_size=target.vocab_size,
        context_length=context_length,
        translation=translation,
        catch_up_tokens=catch_up_tokens,
        read_tokens=read_tokens,
    )
    compute = drafter._compute

    def check_and_compute(parts):
        cache.check(writes=[(p.draft.reader.key, p.start, p.start + len(p.token_ids)) for p in parts])
        compute(parts)

    drafter._compute = check_and_compute
    engine = make_engine(
        runner=target,
        cache=cache,
        costly_drafter=CostlyDrafter(drafter, drafting),
        depth_policy=depth_policy or FixedDepth(3),
        **options,
    )
    return engine, draft, drafter


def asked(option):
    return request("r", [5, 6, 7, 8] * 3, seed=7, **{"temperature": 1.0, "max_tokens": 25, **OPTIONS[option]})


def answers_of(engine, requests):
    for each in requests:
        engine.submit(each)
    answers = drain(engine)
    assert engine.cache.pool.num_referenced == 0
    assert not engine.cache._guests
    return answers


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", RUNNERS)
def test_every_option_gives_the_same_tokens_with_any_draft_model(kind, option):
    each = asked(option)
    engine, *_ = engine_with_draft_model(RUNNERS[kind], budget=64)
    assert as_told(answers_of(engine, [each])) == wanted_of(each)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("groups", ["alike", "coarse"])
def test_a_draft_model_that_is_the_target_is_right_with_every_option(groups, option):
    """At any temperature and with any penalty: it draws with the request's own noise, at the very position."""
    each = asked(option)
    engine, *_ = engine_with_draft_model(draft_groups=DRAFT_GROUPS[groups], budget=64, depth_policy=FixedDepth(4))
    for answer in answers_of(engine, [each]).values():
        metrics = answer.last.metrics
        # What was drafted behind a stop is not counted as accepted.
        assert metrics.accepted_tokens >= metrics.draft_tokens - 4
        assert metrics.accepted_tokens >= 0.6 * metrics.output_tokens or metrics.output_tokens < 5


@settings(max_examples=deeply(30, 600), deadline=None)
@given(st.data())
def test_a_crowd_with_a_draft_model_and_little_memory_gets_what_each_gets_alone(data):
    requests = draw_crowd(data.draw)
    policy, drafting = draw_policies(data.draw, MODEL)
    groups = data.draw(st.sampled_from([ONE_GROUP, TWO_GROUPS]))
    engine, *_ = engine_with_draft_model(
        RUNNERS[data.draw(st.sampled_from(list(RUNNERS)))],
        DRAFT_GROUPS[data.draw(st.sampled_from(list(DRAFT_GROUPS)))],
        groups,
        num_pages=data.draw(st.integers(34, 80)),  # at least what the longest needs
        depth_policy=policy,
        drafting=drafting,
        drafter=SuffixDrafter() if data.draw(st.booleans()) else None,
        budget=data.draw(st.integers(4, 40)),
        catch_up_tokens=data.draw(st.integers(1, 40)),
        read_tokens=data.draw(st.integers(1, 40)),
        caching=data.draw(st.booleans()),
    )
    assert as_told(answers_of(engine, requests)) == wanted_of_all(requests, groups)


def test_each_draft_position_is_one_forward_for_all_and_lacking_tokens_are_computed_in_the_first():
    engine, draft, _ = engine_with_draft_model(budget=64, depth_policy=FixedDepth(3))
    for i in range(4):
        engine.submit(request(f"r{i}", [i + 1, 2, 3], max_tokens=20, ignore_eos=True))
    engine.step()
    assert [len(batch.logits_rows) for batch in draft.batches] == [4, 4, 4]
    assert [len(batch.token_ids) for batch in draft.batches] == [4 * 3, 4, 4]
    del draft.batches[:]
    engine.step()
    # All three drafts were right: the last of them, and the bonus, have no KV yet.
    assert [len(batch.token_ids) for batch in draft.batches] == [2 * 4, 4, 4]


class EverySecond(AlwaysDrafting):
    """Asks at every second step."""

    def __init__(self):
        self.steps = itertools.count()

    def ask(self, sequences, drafts, depths, num_decodes):
        return list(depths) if next(self.steps) % 2 else [0] * len(depths)


@pytest.mark.parametrize("drafting", [AlwaysDrafting, EverySecond])
@pytest.mark.parametrize("draft_groups", DRAFT_GROUPS)
def test_what_is_drafted_after_a_rejection_is_drafted_from_what_stands(draft_groups, drafting):
    """Of rejected drafts the keys and values are computed anew before anything is drafted behind them."""
    engine, *_ = engine_with_draft_model(
        WrongOfEveryFifth,
        DRAFT_GROUPS[draft_groups],
        TWO_GROUPS if draft_groups == "windowed" else ONE_GROUP,
        drafting=drafting(),
        budget=64,
        depth_policy=FixedDepth(4),
    )
    engine.submit(request("r", [1, 2, 3], max_tokens=80, ignore_eos=True, temperature=0.0))
    drafted = 0
    while engine.has_work():
        engine.step()
        (output,) = engine.last_output.step.outputs
        behind = output.scheduled.start + output.scheduled.num_tokens - 1
        right = next(place for place in range(5) if (behind + place) % 5 == 4)
        assert output.num_accepted == min(right, output.num_draft_tokens)
        drafted += output.num_draft_tokens
    assert drafted > 40


def test_a_long_prompt_is_caught_up_with_over_several_steps_and_drafted_for_then():
    engine, draft, _ = engine_with_draft_model(budget=200, catch_up_tokens=10, max_model_len=200)
    engine.submit(request("long", range(1, 45), max_tokens=60, ignore_eos=True))
    engine.submit(request("short", [1, 2, 3], max_tokens=60, ignore_eos=True))
    engine.step()
    proposed = []
    for _ in range(8):
        del draft.batches[:]
        engine.step()
        proposed.append([output.num_draft_tokens for output in engine.last_output.step.outputs])
        assert all(len(batch.token_ids) <= 10 + 2 * 8 for batch in draft.batches)
    of_long = [min(each) for each in proposed]
    # Ten of its 44 tokens at the first step, and ten at each of these.
    assert of_long[:3] == [0, 0, 0]
    assert of_long[4:] == [3, 3, 3, 3]
    assert min(max(each) for each in proposed) == 3


def test_long_prompts_are_translated_a_bounded_part_at_a_step():
    """All together; and only then is anything of them computed."""
    translation = Heard()
    engine, *_ = engine_with_draft_model(
        budget=200, read_tokens=12, max_model_len=200, translation=translation, num_pages=400
    )
    for number in range(3):
        engine.submit(request(f"long {number}", range(number, 45), max_tokens=60, ignore_eos=True))
    engine.submit(request("short", [1, 2, 3], max_tokens=150, ignore_eos=True))
    proposed = []
    for _ in range(30):
        del translation.told[:]
        engine.step()
        far = [count for count in translation.told if count > 8]
        assert sum(far) <= 12
        outputs = engine.last_output.step.outputs
        proposed.append({o.scheduled.sequence.request.request_id: o.num_draft_tokens for o in outputs})
    assert all(each["short"] == 3 for each in proposed[2:])
    assert proposed[2]["long 0"] == 0
    assert set(proposed[-1].values()) == {3}
    drain(engine)


class Thrifty(AlwaysDrafting):
    """Nothing longer is worth reading."""

    def __init__(self, most_tokens):
        self.most_tokens = most_tokens

    def worth_catching_up(self, sequence, num_tokens):
        return num_tokens <= self.most_tokens


def test_a_prompt_that_is_not_worth_drafting_for_is_not_even_translated():
    translation = Heard()
    engine, draft, _ = engine_with_draft_model(budget=200, drafting=Thrifty(30), translation=translation)
    answers_of(engine, [request("r", range(45), max_tokens=20, ignore_eos=True)])
    assert not translation.told
    assert not draft.batches


def test_a_prompt_whose_beginning_is_cached_counts_as_short():
    """What was computed for an earlier request need not be again, so drafting is soon worth its while."""
    translation, drafting = Heard(), Thrifty(100)
    engine, draft, _ = engine_with_draft_model(
        budget=200, drafting=drafting, translation=translation, catch_up_tokens=100
    )
    answers_of(engine, [request("first", range(45), max_tokens=20, ignore_eos=True)])
    drafting.most_tokens = 10
    del translation.told[:], draft.batches[:]
    answer = answers_of(engine, [request("again", range(45), max_tokens=20, ignore_eos=True)])["again", 0]
    assert translation.told[0] == 45
    assert len(draft.batches[0].token_ids) <= 10
    assert answer.last.metrics.accepted_tokens > 0


def adaptive(costs, draft_costs):
    """The policies of a server that learns, given the seconds of steps of both models."""
    acceptance = AcceptanceModel()
    return {
        "depth_policy": AdaptiveDepth(StepCosts(costs), max_depth=8, acceptance=acceptance),
        "drafting": AdaptiveDrafting(StepCosts(costs), StepCosts(draft_costs), acceptance),
    }


def test_a_draft_model_reads_on_at_every_step_though_no_draft_comes_of_it():
    """Where steps are so short that drafts in vain would be tried at a few of them only."""
    costs = {1: 0.001, 64: 0.0011, 4096: 0.01}
    engine, draft, drafter = engine_with_draft_model(
        budget=200,
        **adaptive(costs, {1: 1e-5, 64: 1.1e-5, 4096: 1e-4}),
        catch_up_tokens=10,
        num_pages=400,
        max_model_len=400,
    )
    for policy in (engine._decoder._depth_policy, drafter._policy):
        policy.observe = lambda *_: None  # the toy's own time says nothing
    for number in range(8):
        engine.submit(request(f"r{number}", range(number, 48), max_tokens=100, ignore_eos=True))
    while engine.stats().num_waiting or any(s.num_pending_tokens > 1 for s in engine._scheduler.running):
        engine.step()  # prompts fill these
    for _ in range(45):
        before = len(draft.batches)
        engine.step()
        assert len(draft.batches) > before
    assert engine.stats().drafts["model"].num_accepted_tokens > 0
    drain(engine)


def test_what_one_answer_was_drafted_from_is_found_for_the_next():
    engine, draft, _ = engine_with_draft_model(budget=64)
    answer = answers_of(engine, [request("a", range(1, 25), max_tokens=8, ignore_eos=True)])["a", 0]
    del draft.batches[:]
    answers_of(engine, [request("b", [*range(1, 25), *answer.token_ids[:2], 3], max_tokens=8, ignore_eos=True)])
    assert len(draft.batches[0].token_ids) < 8


def test_with_little_memory_the_drafts_go_and_nobody_is_preempted_for_them():
    requests = [request(f"r{i}", [i, 2, 3, 4, 5], max_tokens=25, ignore_eos=True) for i in range(4)]
    engine, draft, _ = engine_with_draft_model(num_pages=36, budget=64)
    answers = answers_of(engine, requests)
    assert engine.num_preemptions == 0
    assert draft.batches
    assert all(len(answer.token_ids) == 25 for answer in answers.values())


def test_pages_pass_between_target_and_draft_model():
    """What the draft model wrote in one step is the target's in a later one, and the other way round."""
    held = {"target": [], "draft": []}
    engine, *_ = engine_with_draft_model(num_pages=34, budget=64, draft_groups=DRAFT_GROUPS["windowed"])
    for i in range(8):
        engine.submit(request(f"r{i}", [i, 2, 3, 4, 5], max_tokens=30, ignore_eos=True))
    while engine.has_work():
        engine.step()
        engine.check()
        for kind, pages in held.items():
            keys = [name for name in engine.cache._tables if (name in engine.cache._guests) == (kind == "draft")]
            pages.append({block for key in keys for table in engine.cache.tables(key) for block in table.blocks})
    steps = range(len(held["target"]))
    assert not any(held["target"][step] & held["draft"][step] for step in steps)
    for mine, others in (("target", "draft"), ("draft", "target")):
        assert any(held[mine][step] & held[others][later] for step in steps for later in steps[step + 1 :])
    assert engine.cache.pool.num_referenced == 0


def test_a_cancelled_request_leaves_no_draft_behind():
    engine, *_ = engine_with_draft_model(budget=64)
    engine.submit(request("r", [1, 2, 3], max_tokens=30, ignore_eos=True, n=2))
    for _ in range(4):
        engine.step()
    assert engine.cache._guests
    engine.cancel("r")
    assert engine.cache.pool.num_referenced == 0
    drain(engine)


def test_a_draft_model_that_raises_for_one_sequence_drafts_for_the_others_on(capsys):
    class Fragile(ToyRunner):
        def forward(self, batch):
            if 49 in batch.token_ids:
                raise RuntimeError("not this one")
            return super().forward(batch)

    good = request("good", [5, 6, 7], max_tokens=12, ignore_eos=True, logit_bias={49: -100.0})
    bad = request("bad", [49, 6, 7], max_tokens=12, ignore_eos=True)
    engine, *_ = engine_with_draft_model(Fragile, budget=64)
    answers = answers_of(engine, [good, bad])
    assert as_told(answers) == {**wanted_of(good), **wanted_of(bad)}
    assert answers["good", 0].last.metrics.accepted_tokens > 0
    assert answers["bad", 0].last.metrics.draft_tokens == 0
    assert capsys.readouterr().out.count("drafter_switched_off") == 1


def test_one_that_raises_when_asked_whom_it_can_draft_for_drafts_for_the_others_on(capsys):
    good = request("good", [5, 6, 7], max_tokens=12, ignore_eos=True)
    bad = request("bad", [4, 6, 7], max_tokens=12, ignore_eos=True)
    engine, _, drafter = engine_with_draft_model(budget=64)
    room = drafter._room

    def fragile(sequence):
        if sequence.request.request_id == "bad":
            raise RuntimeError("not this one")
        return room(sequence)

    drafter._room = fragile
    answers = answers_of(engine, [good, bad])
    assert as_told(answers) == {**wanted_of(good), **wanted_of(bad)}
    assert answers["good", 0].last.metrics.accepted_tokens > 0
    assert answers["bad", 0].last.metrics.draft_tokens == 0
    assert capsys.readouterr().out.count("drafter_switched_off") == 1


@pytest.mark.parametrize("call", ["forward", "sample", "logprobs", "copy_pages"])
def test_a_device_without_room_for_drafts_costs_drafts_only(call):
    each = request("r", [1, 2, 3], max_tokens=40, ignore_eos=True, temperature=1.0, n=2)
    engine, draft, _ = engine_with_draft_model(budget=64)
    works, calls = getattr(draft, call), []

    def full(*arguments):
        calls.append(call)
        if len(calls) == 3:
            raise OutOfMemoryError("no room")
        return works(*arguments)

    setattr(draft, call, full)
    answers = answers_of(engine, [each])
    assert as_told(answers) == wanted_of(each)
    assert engine._budget.tokens == 64
    assert answers["r", 0].last.metrics.draft_tokens > 0


def test_a_sequence_that_lost_its_drafts_memory_and_has_it_again_is_left_alone_no_longer_the_next_time():
    engine, _, drafter = engine_with_draft_model(budget=64)
    engine.submit(request("r", [1, 2, 3], max_tokens=190, ignore_eos=True))
    rests = []
    for _ in range(3):
        engine.step()
        (reader,) = drafter._readers.values()
        assert engine.cache.evict_guest()
        without = 0
        while reader.key not in engine.cache:
            engine.step()
            without += 1
        rests.append(without)
    assert len(set(rests)) == 1
    drain(engine)


def test_where_drafting_cannot_pay_nothing_of_the_draft_model_runs():
    costs = {1: 0.025, 8: 0.027, 64: 0.1}
    engine, draft, drafter = engine_with_draft_model(
        budget=64,
        **adaptive(costs, costs),
    )
    answers = answers_of(engine, [request(f"r{i}", [1, 2, 3, i], max_tokens=30, ignore_eos=True) for i in range(5)])
    assert all(len(answer.token_ids) == 30 for answer in answers.values())
    assert not draft.batches
    assert not drafter._readers


def test_a_draft_model_that_is_never_right_is_soon_left_alone():
    acceptance = AcceptanceModel()
    target_costs, draft_costs = {1: 0.025, 8: 0.0255, 64: 0.1}, {1: 0.005, 8: 0.0055, 64: 0.02}
    engine, draft, drafter = engine_with_draft_model(
        Opposite,
        budget=64,
        depth_policy=AdaptiveDepth(StepCosts(target_costs), max_depth=8, acceptance=acceptance),
        drafting=AdaptiveDrafting(StepCosts(target_costs), StepCosts(draft_costs), acceptance),
        max_model_len=400,
        num_pages=400,
    )
    for policy in (engine._decoder._depth_policy, drafter._policy):
        policy.observe = lambda *_: None  # the toy's own time says nothing
    for number in range(4):
        del draft.batches[:]
        answers_of(engine, [request("r", [1, 2, 3], max_tokens=100, ignore_eos=True, seed=number)])
    assert len(draft.batches) <= 6


def test_suffix_and_model_share_the_work_and_what_was_not_taken_is_learned_from():
    acceptance = AcceptanceModel()
    costs, draft_costs = StepCosts({1: 0.025, 64: 0.026}), StepCosts({1: 0.002, 64: 0.0021})
    engine, *_ = engine_with_draft_model(
        budget=64,
        drafter=SuffixDrafter(),
        depth_policy=AdaptiveDepth(costs, max_depth=8, acceptance=acceptance),
        drafting=AdaptiveDrafting(costs, draft_costs, acceptance),
    )
    each = request("r", [5, 6, 7, 8] * 4, max_tokens=60, ignore_eos=True)
    wanted = alone(each)["r", 0].token_ids
    again = request("again", [5, 6, 7, 8] * 4, max_tokens=60, ignore_eos=True)
    answers = answers_of(engine, [each])
    assert answers["r", 0].token_ids == wanted
    assert answers_of(engine, [again])["again", 0].token_ids == wanted
    counts = engine.stats().drafts
    assert counts["model"].num_accepted_tokens > 20
    # The second time the answer is known, and reading it off costs nothing.
    assert counts["store"].num_accepted_tokens > 20
    assert {"model", "store", "suffix", "copy"} >= counts.keys()


@pytest.mark.parametrize("vocab_size", [40, 64])
def test_a_draft_model_padded_to_another_size_proposes_nothing_that_the_target_has_not(vocab_size):
    """And is let alone where it cannot read what it is told."""
    each = request("r", [5, 6, 7], max_tokens=40, ignore_eos=True, temperature=1.0, logit_bias={45: 3.0})
    engine, *_ = engine_with_draft_model(budget=64, draft_vocab_size=vocab_size)
    answers = answers_of(engine, [each])
    assert as_told(answers) == wanted_of(each)
    assert 45 in answers["r", 0].token_ids
    assert (answers["r", 0].last.metrics.accepted_tokens == 30) == (vocab_size == 64)


def test_beyond_the_draft_models_context_nothing_is_drafted():
    each = request("r", range(1, 20), max_tokens=40, ignore_eos=True)
    engine, draft, _ = engine_with_draft_model(budget=64, context_length=32)
    assert as_told(answers_of(engine, [each])) == wanted_of(each)
    assert draft.batches
    assert max(batch.positions.max() for batch in draft.batches) < 32


def test_nobody_reckons_with_drafts_for_those_that_cannot_have_any():
    """Too long for the draft model, switched off after a fault, resting since memory was short."""

    class Fragile(ToyRunner):
        def forward(self, batch):
            if 49 in batch.token_ids:
                raise RuntimeError("not this one")
            return super().forward(batch)

    drafting = Recorded()
    engine, _, drafter = engine_with_draft_model(Fragile, budget=100, context_length=32, drafting=drafting)
    engine.submit(request("long", range(1, 40), max_tokens=40, ignore_eos=True))
    engine.submit(request("bad", [49, 6, 7], max_tokens=40, ignore_eos=True))
    engine.submit(request("good", [5, 6, 7], max_tokens=20, ignore_eos=True, logit_bias={49: -100.0}))
    for _ in range(3):
        engine.step()
    assert drafting.told[-1] == {"long": 0, "bad": 0, "good": 3}
    assert engine.cache.evict_guest()
    engine.step()
    assert drafting.told[-1] == {"long": 0, "bad": 0, "good": 0}
    drain(engine)
    assert drafter._step == len(drafting.told)


def test_a_sequences_own_rest_runs_beside_that_of_all():
    class Short(ToyRunner):
        is_short = False

        def forward(self, batch):
            if self.is_short:
                raise OutOfMemoryError("no room")
            return super().forward(batch)

    drafting = Recorded()
    engine, draft, _ = engine_with_draft_model(Short, budget=100, drafting=drafting)
    for name, first in (("one", 5), ("other", 15)):
        engine.submit(request(name, [first, 6, 7], max_tokens=200, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert engine.cache.evict_guest()
    engine.step()
    assert sorted(drafting.told[-1].values()) == [0, 3]  # one rests
    draft.is_short = True
    engine.step()
    draft.is_short = False
    all_rest = len(drafting.told)
    for _ in range(40):
        engine.step()
    able = [min(depths.values()) > 0 for depths in drafting.told[all_rest:]]
    assert able.index(True) == 15
    assert all(able[15:])


def test_what_is_longer_than_the_draft_models_context_holds_none_of_its_blocks():
    engine, *_ = engine_with_draft_model(budget=64, context_length=32)
    engine.submit(request("r", range(1, 20), max_tokens=60, ignore_eos=True))
    held = []
    while engine.has_work():
        engine.step()
        engine.check()
        held.append(len(engine.cache._guests))
    assert held[:3] == [1, 1, 1]
    assert not any(held[-20:])


def test_a_sequence_that_the_draft_model_raises_for_holds_none_of_its_blocks():
    """Not even what was computed before, while all went well."""

    class Breaking(ToyRunner):
        def forward(self, batch):
            if batch.context_lens.max() > 20:
                raise RuntimeError("too far")
            return super().forward(batch)

    engine, _, drafter = engine_with_draft_model(Breaking, budget=64)
    engine.submit(request("r", [5, 6, 7], max_tokens=40, ignore_eos=True))
    engine.step()
    assert engine.cache._guests
    while len(engine.cache.tables(("r", 0))[0].blocks) < 8:
        engine.step()
    assert not engine.cache._guests
    assert not drafter._readers
    drain(engine)


def test_noise_is_that_of_the_targets_own_place_where_the_draft_model_lacks_a_token():
    each = request(
        "r", [5, 49, 6, 49, 7], seed=7, max_tokens=30, ignore_eos=True, temperature=1.0, logit_bias={49: -100.0}
    )
    engine, *_ = engine_with_draft_model(Forgetful, target_kind=Forgetful, budget=64, translation=Lacking(VOCAB, VOCAB))
    metrics = answers_of(engine, [each])["r", 0].last.metrics
    assert metrics.draft_tokens > 15
    # What was drafted behind the last token is not counted as accepted.
    assert metrics.accepted_tokens >= metrics.draft_tokens - 3
