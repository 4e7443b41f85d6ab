"""Speculation cannot be seen in what is answered, whatever is drafted, however deep, with any option."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from compat_tests.engine.speculation_cases import DRAFTERS, draw_crowd, got_from, wanted_of, wanted_of_all, worst
from compat_tests.engine.toy import (
    ONE_GROUP,
    TWO_GROUPS,
    ScriptedDrafter,
    ToyRunner,
    alone,
    drain,
    make_engine,
    request,
)
from helix_gateway.engine.depth import AdaptiveDepth, FixedDepth
from helix_gateway.engine.drafters.base import NOTHING, DraftTokens
from helix_gateway.engine.drafters.chain import CostlyDrafter
from helix_gateway.engine.drafters.none import NoDrafter
from helix_gateway.engine.drafters.suffix import SuffixDrafter
from helix_gateway.engine.drafting import AlwaysDrafting
from helix_gateway.engine.step_costs import StepCosts

FREE = StepCosts({1: 0.01, 64: 0.0101})
"""Rows cost next to nothing, so that all that is drafted is verified."""
DEAR = StepCosts({rows: 0.01 * rows**1.3 for rows in (1, 2, 4, 8, 16, 32, 64)})
"""Two rows cost more than twice as much as one."""


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_crowd_with_any_drafters_depths_and_little_memory_gets_what_each_gets_alone(data):
    requests = draw_crowd(data.draw)
    drafter = data.draw(st.sampled_from(list(DRAFTERS)))
    policy = data.draw(st.sampled_from([FixedDepth(1), FixedDepth(6), AdaptiveDepth(FREE, max_depth=8)]))
    engine = make_engine(
        data.draw(st.integers(34, 80)),  # at least what the longest needs
        TWO_GROUPS,
        budget=data.draw(st.integers(4, 40)),
        drafter=DRAFTERS[drafter]({}),
        depth_policy=policy,
    )
    got, _ = got_from(engine, requests)
    assert got == wanted_of_all(requests, TWO_GROUPS)


class Trace(ToyRunner):
    """Writes down what is called, with what."""

    def __post_init__(self):
        super().__post_init__()
        self.calls = []

    def forward(self, batch):
        self.calls.append(("forward", batch.token_ids.tolist(), batch.positions.tolist(), batch.logits_rows.tolist()))
        return super().forward(batch)

    def sample(self, logits, rows):
        self.calls.append(("sample", len(rows.seed)))
        return super().sample(logits, rows)

    def logprobs(self, *arguments):
        self.calls.append(("logprobs", arguments[1].tolist()))
        return super().logprobs(*arguments)


class Untouched:
    """Counts how often it is asked: what it raised would be taken for a drafter's fault, and nobody would hear of it."""

    def __init__(self):
        self.num_asked = 0

    def begin_step(self, sequences, depths):
        self.num_asked += 1
        return [0] * len(sequences)

    def propose(self, sequences, depths):
        self.num_asked += 1
        return [NOTHING] * len(sequences)

    def retire(self, sequence):
        pass


def test_where_rows_are_dear_nothing_of_a_drafter_runs_and_the_calls_are_those_of_plain_decoding():
    traces, drafter, costly = [], Untouched(), Untouched()
    with_drafters = {
        "drafter": drafter,
        "costly_drafter": CostlyDrafter(costly, AlwaysDrafting()),
        "depth_policy": AdaptiveDepth(DEAR, max_depth=4),
    }
    for options in ({}, with_drafters):
        runner = Trace(ONE_GROUP, 200)
        engine = make_engine(runner=runner, **options)
        for i in range(4):
            engine.submit(request(f"r{i}", [1, 2, 3, 4] * (i + 1), logprobs=1, seed=i))
        drain(engine)
        traces.append(runner.calls)
    assert traces[0] == traces[1]
    assert (drafter.num_asked, costly.num_asked) == (0, 0)


@pytest.mark.parametrize("cap", [0, 2, 5])
def test_a_request_is_drafted_for_no_deeper_than_it_asks_for(cap):
    engine = make_engine(drafter=ScriptedDrafter(worst), depth_policy=FixedDepth(4), budget=64)
    engine.submit(request("capped", [1, 2, 3], max_tokens=20, ignore_eos=True, max_depth=cap))
    engine.submit(request("free", [1, 2, 3], max_tokens=20, ignore_eos=True))
    for name, _, drafted in itertools.chain.from_iterable(windows_of(engine) for _ in range(10)):
        assert drafted == (min(cap, 4) if name == "capped" else 4)


def test_a_drafter_that_fails_for_one_sequence_serves_the_others_on():
    class Fragile(ScriptedDrafter):
        def propose(self, sequences, depths):
            if any(sequence.request.request_id == "bad" for sequence in sequences):
                raise ValueError("not this one")
            return super().propose(sequences, depths)

    requests = [request(name, [5, 6, 7], max_tokens=12, seed=3) for name in ("good", "bad")]
    wanted = {}
    for each in requests:
        wanted |= alone(each)
    drafter = Fragile(lambda sequence, tokens: (wanted[sequence.key].token_ids + [0] * 20)[len(tokens) - 3])
    engine = make_engine(drafter=drafter, depth_policy=FixedDepth(2))
    with capture_logs() as lines:
        answers = got_from(engine, requests)[1]
    assert [(line["event"], line["request_id"]) for line in lines] == [("drafter_switched_off", "bad")]
    assert {key: a.token_ids for key, a in answers.items()} == {key: a.token_ids for key, a in wanted.items()}
    assert answers["good", 0].last.metrics.accepted_tokens > 0
    assert answers["bad", 0].last.metrics.draft_tokens == 0


def test_tokens_that_are_none_are_told_with_the_name_of_who_proposed_them():
    drafts = [DraftTokens("good", np.array([1]), np.array([0.5])), DraftTokens("bad", np.array([50]), np.array([0.5]))]

    class Careless(ScriptedDrafter):
        def propose(self, sequences, depths):
            return [drafts[sequence.request.request_id == "bad"] for sequence in sequences]

    engine = make_engine(drafter=Careless(worst), depth_policy=FixedDepth(2))
    with capture_logs() as lines:
        got_from(engine, [request(name, [5, 6, 7], max_tokens=6) for name in ("good", "bad")])
    assert [(line["request_id"], line["reason"]) for line in lines] == [
        ("bad", "ValueError('bad proposed tokens that are none')")
    ]


def test_a_prediction_is_drafted_from_and_told_apart_in_the_figures():
    each = request("r", [1, 2, 3], max_tokens=20, ignore_eos=True, temperature=1.0)
    text = alone(each)["r", 0].token_ids
    predicted = [*text[:8], 49, 49, *text[10:]]

    def ask(prediction):
        engine = make_engine(drafter=SuffixDrafter(store_tokens=0), depth_policy=FixedDepth(4), budget=64)
        asked = type(each)(
            **{**{f: getattr(each, f) for f in each.__struct_fields__}, "prediction_token_ids": prediction}
        )
        return got_from(engine, [asked])[1]["r", 0]

    answer = ask(predicted)
    assert answer.token_ids == text
    metrics = answer.last.metrics
    assert metrics.accepted_prediction_tokens >= 10
    assert metrics.rejected_prediction_tokens >= 1
    assert metrics.accepted_tokens >= metrics.accepted_prediction_tokens
    assert ask([]).last.metrics.accepted_prediction_tokens == 0


@pytest.mark.parametrize("groups", [ONE_GROUP, TWO_GROUPS], ids=["one group", "a window too"])
def test_blocks_that_only_rejected_drafts_lie_in_are_given_back_at_once(groups):
    engine = make_engine(groups=groups, drafter=ScriptedDrafter(worst), depth_policy=FixedDepth(9), budget=64)
    for i in range(3):
        engine.submit(request(f"r{i}", [1, 2, 3, i], max_tokens=20, ignore_eos=True))
    while engine.has_work():
        engine.step()
        for sequence in engine.running:
            for table in engine.cache.tables(sequence.key):
                assert table.num_entries == table.entries_for(sequence.num_computed_tokens)
                assert len(table.blocks) == table.num_entries - table.first_needed(sequence.num_computed_tokens)


def test_drafts_of_more_tokens_than_were_asked_for_are_cut():
    class Talkative:
        def propose(self, sequences, depths):
            return [DraftTokens("much", np.full(50, 11, np.int32), np.ones(50, np.float32)) for _ in sequences]

        def retire(self, sequence):
            pass

    each = request("r", [1, 2, 3], max_tokens=10)
    engine = make_engine(drafter=Talkative(), depth_policy=FixedDepth(2))
    assert got_from(engine, [each])[0] == wanted_of(each)


def test_drafts_take_no_token_from_others():
    engine = make_engine(
        400, drafter=ScriptedDrafter(worst), depth_policy=AdaptiveDepth(FREE, max_depth=32), budget=32, max_num_seqs=16
    )
    for i in range(16):
        engine.submit(request(f"r{i}", [1, 2, 3], max_tokens=40, ignore_eos=True))
    for _ in range(10):
        engine.step()
    joined = {sequence.key: sequence.num_output_tokens for sequence in engine.running}
    assert len(joined) == 16
    for _ in range(5):
        engine.step()
    assert all(sequence.num_output_tokens >= joined[sequence.key] + 5 for sequence in engine.running)


def windows_of(engine):
    """(Sequence, tokens computed, draft tokens) of a step."""
    engine.step()
    return [
        (output.scheduled.sequence.request.request_id, output.scheduled.num_tokens, output.num_draft_tokens)
        for output in engine.last_output.step.outputs
    ]


def test_what_a_step_has_room_for_is_shared_out_among_all_who_draft():
    drafter = ScriptedDrafter(lambda sequence, tokens: 11)
    engine = make_engine(400, drafter=drafter, depth_policy=FixedDepth(32), budget=40, max_num_seqs=8)
    for i in range(8):
        engine.submit(request(f"r{i}", [1, 2, 3], max_tokens=60, ignore_eos=True))
    while engine.num_waiting or any(sequence.num_pending_tokens > 1 for sequence in engine.running):
        engine.step()
    assert [drafted for _, _, drafted in windows_of(engine)] == [4] * 8


def test_drafts_leave_a_long_prompt_half_of_each_step():
    drafter = ScriptedDrafter(lambda sequence, tokens: 11)
    engine = make_engine(400, drafter=drafter, depth_policy=FixedDepth(32), budget=40, max_num_seqs=8)
    engine.submit(request("short", [1, 2, 3], max_tokens=100, ignore_eos=True))
    engine.step()
    engine.submit(request("long", [1, 2, 3, 4] * 40, max_tokens=4))
    engine.step()
    (_, _, drafted), (_, computed, _) = windows_of(engine)
    assert drafted > 0
    assert computed >= 20


def test_what_may_be_drafted_keeps_nobody_waiting_who_fits_the_step():
    engine = make_engine(400, drafter=ScriptedDrafter(lambda *_: 11), depth_policy=FixedDepth(8), budget=40)
    for i in range(8):
        engine.submit(request(f"r{i}", [1, 2, 3, i], max_tokens=60, ignore_eos=True))
    assert [(computed, drafted) for _, computed, drafted in windows_of(engine)] == [(4, 1)] * 8


def test_drafting_begins_though_prompts_fill_the_steps():
    drafter = ScriptedDrafter(lambda sequence, tokens: 11)
    engine = make_engine(
        2000, drafter=drafter, depth_policy=FixedDepth(8), budget=40, max_num_seqs=40, max_model_len=900
    )
    for i in range(4):
        engine.submit(request(f"short{i}", [1, 2, i], max_tokens=400, ignore_eos=True))
    engine.step()
    for i in range(30):
        engine.submit(request(f"long{i}", [1, 2, 3, i] * 40, max_tokens=4))
    drafted = []
    while engine.num_waiting:
        windows = windows_of(engine)
        drafted.append([n for name, _, n in windows if name.startswith("short")])
        assert sum(computed for name, computed, _ in windows if name.startswith("long")) >= 18
    assert len(drafted) > 50
    assert all(min(depths) >= 2 for depths in drafted[5:])


def test_a_policy_that_raises_costs_drafts_and_nothing_else():
    class Broken(FixedDepth):
        def most(self, sequence, num_decodes):
            raise ArithmeticError

    engine = make_engine(400, drafter=ScriptedDrafter(lambda *_: 11), depth_policy=Broken(8), budget=40)
    wanted = {}
    for i in range(3):
        engine.submit(one := request(f"r{i}", [1, 2, i], max_tokens=20, ignore_eos=True))
        wanted |= alone(one)
    answers = drain(engine)
    assert {key: answer.token_ids for key, answer in answers.items()} == {
        key: answer.token_ids for key, answer in wanted.items()
    }


def test_who_never_drafts_leaves_a_long_prompt_all_of_a_step():
    engine = make_engine(400, drafter=NoDrafter(), depth_policy=FixedDepth(0), budget=40, max_num_seqs=8)
    engine.submit(request("short", [1, 2, 3], max_tokens=100, ignore_eos=True))
    engine.step()
    engine.submit(request("long", [1, 2, 3, 4] * 39, max_tokens=4))
    engine.step()
    assert [computed for _, computed, _ in windows_of(engine)] == [1, 39]


@pytest.mark.parametrize(
    "proposal",
    [
        DraftTokens("short of confidence", np.array([1, 2], np.int32), np.ones(1, np.float32)),
        DraftTokens("beyond the vocabulary", np.array([10**6], np.int32), np.ones(1, np.float32)),
        DraftTokens("negative", np.array([-1], np.int32), np.ones(1, np.float32)),
    ],
    ids=lambda proposal: proposal.source,
)
def test_what_is_no_draft_is_not_verified(proposal):
    class Wrong:
        def propose(self, sequences, depths):
            return [proposal for _ in sequences]

        def retire(self, sequence):
            pass

    each = request("r", [1, 2, 3], max_tokens=10)
    engine = make_engine(drafter=Wrong(), depth_policy=FixedDepth(2))
    assert got_from(engine, [each])[0] == wanted_of(each)


def test_a_drafter_that_forgets_a_sequence_is_done_without():
    class Forgetful:
        def propose(self, sequences, depths):
            return []

        def retire(self, sequence):
            pass

    each = request("r", [1, 2, 3], max_tokens=10)
    assert got_from(make_engine(drafter=Forgetful(), depth_policy=FixedDepth(2)), [each])[0] == wanted_of(each)


def test_what_is_right_but_lies_behind_a_stop_is_not_counted_as_accepted():
    each = request("r", [1, 2, 3], max_tokens=20, ignore_eos=True, temperature=1.0)
    text = alone(each)["r", 0].token_ids
    stopping = request("r", [1, 2, 3], max_tokens=20, ignore_eos=True, temperature=1.0, stop_token_ids=(text[3],))
    drafter = ScriptedDrafter(lambda sequence, tokens: (text + [0] * 20)[len(tokens) - 3])
    metrics = got_from(make_engine(drafter=drafter, depth_policy=FixedDepth(10), budget=64), [stopping])[1]
    assert metrics["r", 0].last.metrics.accepted_tokens <= len(metrics["r", 0].token_ids)
