"""What a request gets from the engine does not depend on who else is there, on memory, on chunks or on drafts."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_tests.effort import deeply
from compat_tests.engine.toy import (
    EOS,
    ONE_GROUP,
    TWO_GROUPS,
    VOCAB,
    Answers,
    ScriptedDrafter,
    ToyRunner,
    alone,
    drain,
    logits_after,
    make_engine,
    request,
)
from compat_tests.runtime.sampling_reference import Row, reference_token
from helix_gateway.core.errors import ContextLengthError, InvalidRequestError, OutOfMemoryError, QueueFullError
from helix_gateway.core.kv import KVGroup
from helix_gateway.core.protocols import StopMatch
from helix_gateway.engine.depth import FixedDepth
from helix_gateway.engine.engine import ChoiceHooks

sampling_options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "seed": st.integers(0, 2**64 - 1),
        "max_tokens": st.integers(1, 14),
    },
    optional={
        "n": st.integers(1, 3),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 1.5]),
        "frequency_penalty": st.sampled_from([-0.5, 1.0]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 3.0]), max_size=3),
        "bad_words": st.sampled_from([((3,),), ((5, 6), (7,)), ((1, 2, 3),)]),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.sampled_from([(9,), (4, 11)]),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 3),
        "prompt_logprobs": st.integers(0, 2),
    },
)
prompts = st.one_of(
    st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=40),
    # Many prompts share a beginning, some are equal.
    st.integers(1, 40).map(lambda length: [1 + i % 7 for i in range(length)]),
)
requests = st.lists(st.tuples(prompts, sampling_options, st.integers(-1, 1)), min_size=1, max_size=7)


def make_requests(drawn):
    return [
        request(f"r{i}", prompt, priority=priority, **options) for i, (prompt, options, priority) in enumerate(drawn)
    ]


def assert_same(answers, wanted):
    for key, answer in wanted.items():
        got = answers[key]
        assert got.token_ids == answer.token_ids
        assert got.logprobs == answer.logprobs
        assert got.prompt_logprobs == answer.prompt_logprobs
        assert (got.last.finish_reason, got.last.stop_reason) == (answer.last.finish_reason, answer.last.stop_reason)


@settings(deadline=None)
@given(
    drawn=requests,
    groups=st.sampled_from([ONE_GROUP, TWO_GROUPS, (KVGroup("one", 1, None),), (KVGroup("window", 3, 7),)]),
    spare_pages=st.integers(0, 30),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 8),
    caching=st.booleans(),
    depth=st.integers(0, 4),
    drafting=st.integers(0, 2**32),
)
def test_everybody_gets_what_they_would_get_alone(
    drawn, groups, spare_pages, budget, max_num_seqs, caching, depth, drafting
):
    wanted_requests = make_requests(drawn)
    longest = max(len(r.prompt_token_ids) + r.sampling.max_tokens for r in wanted_requests)
    least_pages = sum(-(-longest // group.tokens_per_block) + 1 for group in groups)
    dice = random.Random(drafting)
    engine = make_engine(
        least_pages + spare_pages,
        groups,
        budget=budget,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=caching,
        drafter=ScriptedDrafter(lambda sequence, tokens: dice.randrange(VOCAB)),
        depth_policy=FixedDepth(depth),
    )
    answers = Answers()
    for wanted in wanted_requests:
        engine.submit(wanted)
        if dice.random() < 0.5:
            answers.take(engine.step())
            engine.check()
    answers = drain(engine, answers)
    for wanted in wanted_requests:
        assert_same(answers, alone(wanted, groups))
    assert engine.cache.pool.num_referenced == 0


@settings(deadline=None, max_examples=deeply(40, 2000))
@given(
    drawn=requests,
    groups=st.sampled_from([ONE_GROUP, TWO_GROUPS]),
    depth=st.integers(1, 5),
    error_rate=st.sampled_from([0, 0.3]),
)
def test_good_drafts_are_accepted_and_change_nothing(drawn, groups, depth, error_rate):
    wanted = {}
    for request_ in make_requests(drawn):
        wanted |= alone(request_, groups)
    dice = random.Random(1)

    def oracle(sequence, tokens):
        future = sequence.request.prompt_token_ids + wanted[sequence.key].token_ids
        known = len(tokens) < len(future) and dice.random() >= error_rate
        return future[len(tokens)] if known else dice.randrange(VOCAB)

    # Room for all prompts and drafts at once: where there is less, prompts go first.
    engine = make_engine(400, groups, budget=512, drafter=ScriptedDrafter(oracle), depth_policy=FixedDepth(depth))
    for request_ in make_requests(drawn):
        engine.submit(request_)
    answers = drain(engine)
    assert_same(answers, wanted)
    if error_rate == 0:
        long_ones = [a.last.metrics for key, a in answers.items() if len(wanted[key].token_ids) > depth + 1]
        assert all(metrics.accepted_tokens >= depth for metrics in long_ones)


def reference_tokens(prompt, choice, *, count, seed, temperature):
    """The toy model sampled by hand: the noise of a token is counted by its place, prompt included."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        row = Row(seed=seed, choice=choice, position=len(tokens), temperature=temperature)
        tokens.append(reference_token(logits_after([tuple(tokens)]).astype(np.float32), row))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("budget", [4, 64])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_noise_is_counted_by_the_place_where_the_token_will_stand(length, budget, depth):
    prompt, options = list(range(1, 1 + length)), {"seed": 7, "temperature": 1.5}
    wanted = [reference_tokens(prompt, choice, count=9, **options) for choice in range(2)]
    drafter = ScriptedDrafter(lambda sequence, tokens: (prompt + wanted[sequence.index] + [1] * 9)[len(tokens)])
    engine = make_engine(budget=budget, drafter=drafter, depth_policy=FixedDepth(depth))
    for again in range(2):  # the second time out of the prefix cache
        engine.submit(request(f"r{again}", prompt, n=2, max_tokens=9, ignore_eos=True, **options))
        answers = drain(engine)
        assert [answers[f"r{again}", choice].token_ids for choice in range(2)] == wanted


def test_a_second_turn_computes_only_what_is_new_and_less_than_a_block():
    engine = make_engine(budget=100)
    engine.submit(request("turn1", range(1, 30), ignore_eos=True, max_tokens=10))
    first = drain(engine)["turn1", 0].token_ids
    second_prompt = [*range(1, 30), *first, 7, 8, 9]
    engine.submit(request("turn2", second_prompt))
    answers = drain(engine)
    cached = answers["turn2", 0].last.metrics.cached_tokens
    # The last token of an answer was never fed back, so it counts as new.
    assert len(second_prompt) - cached < 4 + 1 + ONE_GROUP[0].tokens_per_block


def test_a_prompt_that_is_cached_whole_computes_one_token_and_writes_to_no_shared_block():
    engine = make_engine(budget=100)
    prompt = list(range(1, 17))
    engine.submit(request("first", prompt, ignore_eos=True))
    drain(engine)
    engine.submit(request("again", prompt, ignore_eos=True))
    answers = drain(engine)
    assert answers["again", 0].last.metrics.cached_tokens == 15


def test_choices_share_the_prompts_blocks():
    engine = make_engine(300, budget=200)
    engine.submit(request("many", range(1, 42), n=5, temperature=1.0, ignore_eos=True, max_tokens=4))
    answers = Answers()
    for _ in range(2):
        answers.take(engine.step())
    # 41 tokens: ten full blocks in common, and the eleventh, with its continuation, five times.
    assert engine.cache.pool.num_referenced <= 10 + 5 * 2
    drain(engine, answers)
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == 5


def test_equal_prompts_with_other_salts_share_nothing():
    engine = make_engine(budget=100)
    for salt in ("a", "b"):
        engine.submit(request(salt, range(1, 30), cache_salt=salt))
        answers = drain(engine)
        assert answers[salt, 0].last.metrics.cached_tokens == 0


def test_a_better_priority_goes_first_and_takes_the_others_memory():
    engine = make_engine(12, budget=100, max_num_seqs=2)
    engine.submit(request("late", range(1, 30), priority=5, ignore_eos=True, max_tokens=12))
    answers = Answers()
    for _ in range(3):
        answers.take(engine.step())
    engine.submit(request("urgent", range(2, 31), priority=-5, ignore_eos=True, max_tokens=12))
    drain(engine, answers)
    assert answers["late", 0].last.metrics.num_preemptions >= 1
    assert answers["urgent", 0].last.metrics.num_preemptions == 0
    assert len(answers["late", 0].token_ids) == 12


def test_a_sequence_joins_at_the_step_after_it_arrives():
    engine = make_engine(budget=100)
    engine.submit(request("one", [1, 2, 3], ignore_eos=True, max_tokens=20))
    engine.step()
    engine.submit(request("two", [4, 5], ignore_eos=True, max_tokens=20))
    events = engine.step()
    assert {event.request_id for event in events} == {"one", "two"}


def test_a_cancelled_request_gives_its_blocks_back_at_once():
    engine = make_engine(budget=100)
    engine.submit(request("gone", range(1, 30), n=3, ignore_eos=True))
    engine.step()
    engine.cancel("gone")
    assert engine.cache.pool.num_referenced == 0
    assert {event.finish_reason for event in engine.step()} == {"abort"}
    assert not engine.has_work()


def test_a_stop_token_ends_before_it_is_appended():
    engine = make_engine()
    engine.submit(request("r", [1, 2], ignore_eos=True, temperature=0.0, max_tokens=6))
    plain = drain(engine)["r", 0].token_ids
    engine.submit(request("s", [1, 2], ignore_eos=True, temperature=0.0, max_tokens=6, stop_token_ids=(plain[2],)))
    answer = drain(engine)["s", 0]
    stop_at = plain.index(plain[2])
    assert answer.token_ids == plain[:stop_at]
    assert (answer.last.finish_reason, answer.last.stop_reason) == ("stop", plain[2])


def test_eos_ends_without_a_stop_reason_and_min_tokens_holds_it_off():
    bias = {EOS: 100.0}
    engine = make_engine()
    engine.submit(request("now", [1], logit_bias=bias))
    engine.submit(request("later", [1], logit_bias=bias, min_tokens=3))
    engine.submit(request("never", [1], logit_bias=bias, ignore_eos=True))
    answers = drain(engine)
    assert answers["now", 0].token_ids == []
    assert (answers["now", 0].last.finish_reason, answers["now", 0].last.stop_reason) == ("stop", None)
    assert len(answers["later", 0].token_ids) == 3
    assert answers["never", 0].token_ids == [EOS] * 8


class StopAt:
    """A stop condition that ends with the k-th token."""

    def __init__(self, k):
        self.left = k

    def feed(self, token_ids):
        self.left -= len(token_ids)
        return StopMatch(len(token_ids) + self.left, "here") if self.left <= 0 else None


@pytest.mark.parametrize("depth", [0, 4])
def test_a_stop_condition_ends_a_sequence_inside_a_window(depth):
    plain = alone(request("r", [1, 2], ignore_eos=True))["r", 0].token_ids
    drafter = ScriptedDrafter(lambda sequence, tokens: plain[(len(tokens) - 2) % 8])
    engine = make_engine(drafter=drafter, depth_policy=FixedDepth(depth))
    engine.submit(request("r", [1, 2], ignore_eos=True), [ChoiceHooks(stop=StopAt(3))])
    answer = drain(engine)["r", 0]
    assert answer.token_ids == plain[:3]
    assert (answer.last.finish_reason, answer.last.stop_reason) == ("stop", "here")
    assert engine.cache.pool.num_referenced == 0


def test_a_full_pool_finishes_everybody():
    engine = make_engine(14, budget=16, max_model_len=48, max_num_seqs=16)
    for i in range(16):
        engine.submit(request(f"r{i}", [i + 1] * (5 + i), ignore_eos=True, max_tokens=20))
    answers = drain(engine)
    assert all(len(answer.token_ids) == 20 for answer in answers.values())
    assert engine.num_preemptions > 0


def test_the_end_of_the_context_is_length():
    engine = make_engine(max_model_len=20)
    engine.submit(request("r", range(1, 15), ignore_eos=True, max_tokens=None))
    answer = drain(engine)["r", 0]
    assert len(answer.token_ids) == 20 - 14
    assert answer.last.finish_reason == "length"


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers():
    engine = make_engine(max_model_len=20)
    with pytest.raises(ContextLengthError, match=r"20 tokens.*25 tokens"):
        engine.submit(request("r", [1] * 25))
    assert not engine.has_work()


def test_a_small_pool_lowers_the_context_instead_of_hanging():
    engine = make_engine(6, max_model_len=1000)
    assert engine.max_model_len == 20
    engine.submit(request("r", range(1, 20), ignore_eos=True))
    drain(engine)
    # The same again: all of it is cached, and the copy of the last block must fit too.
    engine.submit(request("again", range(1, 20), ignore_eos=True))
    drain(engine)


def test_a_full_queue_is_refused():
    engine = make_engine()
    with pytest.raises(QueueFullError):
        for i in range(1009):
            engine.submit(request(f"r{i}", [1]))
    assert engine.num_waiting == 1008  # eight fill the batch at the next step


class FailingRunner(ToyRunner):
    """Raises what it is told to at the forwards it is told."""

    failures: dict

    def forward(self, batch):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls in self.failures:
            raise self.failures[self.calls]
        return super().forward(batch)


def test_out_of_memory_is_retried_smaller_and_changes_nothing():
    runner = FailingRunner(ONE_GROUP, 100)
    runner.failures = dict.fromkeys([1, 4, 5], OutOfMemoryError("no room"))
    engine = make_engine(runner=runner)
    wanted = [request(f"r{i}", range(1, 20 + i), n=2, temperature=1.0) for i in range(3)]
    for each in wanted:
        engine.submit(each)
    answers = drain(engine)
    for each in wanted:
        assert_same(answers, alone(each))


def test_what_does_not_fit_even_alone_fails_alone():
    runner = FailingRunner(ONE_GROUP, 100)
    runner.failures = dict.fromkeys(range(1, 8), OutOfMemoryError("no room"))
    engine = make_engine(runner=runner)
    engine.submit(request("big", range(1, 20)))
    answer = drain(engine)["big", 0]
    assert answer.last.finish_reason == "error"
    assert "Out of memory" in answer.last.error
    assert engine.cache.pool.num_referenced == 0


def test_a_fault_fails_the_step_and_nobody_later():
    runner = FailingRunner(ONE_GROUP, 100)
    runner.failures = {2: ZeroDivisionError()}
    engine = make_engine(runner=runner)
    engine.submit(request("unlucky", range(1, 10), ignore_eos=True))
    answers = drain(engine)
    engine.submit(request("lucky", range(1, 10), ignore_eos=True))
    drain(engine, answers)
    assert answers["unlucky", 0].last.finish_reason == "error"
    assert answers["lucky", 0].last.finish_reason == "length"
    assert engine.cache.pool.num_referenced == 0


def test_metrics_tell_when_each_token_came():
    engine = make_engine(budget=4)
    engine.submit(request("r", range(1, 12), ignore_eos=True, max_tokens=3))
    metrics = drain(engine)["r", 0].last.metrics
    assert metrics.output_tokens == len(metrics.token_times_s) == 3
    assert 0 <= metrics.queue_time_s <= metrics.time_to_first_token_s == metrics.token_times_s[0]
    assert metrics.token_times_s == sorted(metrics.token_times_s)


def test_the_step_grows_again_after_memory_was_short():
    runner = FailingRunner(ONE_GROUP, 100)
    runner.failures = dict.fromkeys([1], OutOfMemoryError("no room"))
    engine = make_engine(runner=runner, budget=16)
    engine.submit(request("small", [1, 2], ignore_eos=True, max_tokens=8))
    drain(engine)
    engine.submit(request("large", range(1, 33), ignore_eos=True))
    engine.step()
    assert len(runner.batches[-1].token_ids) == 16


@pytest.mark.parametrize("length, chunks", [(16, [16]), (17, [9, 8]), (35, [12, 12, 11]), (48, [16, 16, 16])])
def test_a_prompt_takes_as_few_steps_as_will_do_of_like_size(length, chunks):
    engine = make_engine(budget=16)
    engine.submit(request("long", [1 + i % 40 for i in range(length)], max_tokens=1, ignore_eos=True))
    computed = []
    while engine.has_work():
        engine.step()
        computed.append(engine.last_output.step.outputs[0].scheduled.num_tokens)
    assert computed == chunks


def test_a_long_prompt_does_not_keep_arrivals_waiting():
    engine = make_engine(budget=16)
    engine.submit(request("long", [1 + i % 40 for i in range(150)], ignore_eos=True))
    engine.step()
    engine.submit(request("short", [1, 2, 3], ignore_eos=True))
    assert {event.request_id for event in engine.step()} == {"short"}


@pytest.mark.parametrize(
    "places, pages, computed", [(2, 100, [14, 7, 10]), (1, 100, [14, 13, 13]), (2, 12, [14, 7, 10])]
)
def test_a_long_prompt_gives_way_only_to_who_could_run_beside_it(places, pages, computed):
    """Not where there is no place, nor where there is no memory, which is known once the other has looked for its prompt."""
    engine = make_engine(pages, budget=16, max_num_seqs=places)
    chunks = []
    for name, token in (("long", 1), ("next", 2), (None, 0)):
        if name:
            engine.submit(request(name, [token] * 40, ignore_eos=True, max_tokens=2))
        engine.step()
        chunks.append(engine.last_output.step.outputs[0].scheduled.num_tokens)
    assert chunks == computed
    assert engine.num_waiting == (pages < 100 or places < 2)


class Raising:
    """A stop condition with a fault."""

    def feed(self, token_ids):
        raise KeyError(token_ids[0])


def test_a_stop_condition_that_raises_ends_its_own_request_only():
    engine = make_engine()
    engine.submit(request("faulty", [1, 2], ignore_eos=True, n=2), [ChoiceHooks(stop=Raising()), ChoiceHooks()])
    engine.submit(request("fine", [3, 4], ignore_eos=True))
    answers = drain(engine)
    assert answers["faulty", 0].last.finish_reason == "error"
    assert answers["fine", 0].last.finish_reason == "length"
    assert engine.cache.pool.num_referenced == 0


@pytest.mark.parametrize(
    "prompt, options",
    [
        ([], {}),
        ([VOCAB], {}),
        ([-1], {}),
        ([1], {"n": 0}),
        ([1], {"max_tokens": 0}),
        ([1], {"temperature": float("nan")}),
        ([1], {"top_p": 0.0}),
        ([1], {"logit_bias": {VOCAB: 1.0}}),
        ([1], {"bad_words": ((VOCAB,),)}),
        ([1], {"stop_token_ids": (-1,), "min_tokens": 2}),
    ],
)
def test_what_would_break_a_step_is_refused_before_it(prompt, options):
    engine = make_engine()
    with pytest.raises(InvalidRequestError):
        engine.submit(request("bad", prompt, **options))
    assert not engine.has_work()
