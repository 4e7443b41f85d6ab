"""The figures for `/metrics`: they add up to what clients got, whatever happens to the engine between."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from compat_tests.engine.toy import VOCAB, Answers, ScriptedDrafter, alone, drain, make_engine, request
from compat_tests.scraping import Scrape
from helix_gateway.core.event import SequenceMetrics, TokenEvent
from helix_gateway.core.stats import StepSeconds
from helix_gateway.engine.depth import FixedDepth
from helix_gateway.service.observer import EngineObserver
from helix_gateway.telemetry.histogram import BulkHistogram
from helix_gateway.telemetry.metrics import Metrics


class Observed:
    """A toy engine whose every step is reported to an observer."""

    def __init__(self, observer=None, **options):
        self.metrics = Metrics() if observer is None else observer._metrics
        self.observer = observer or EngineObserver(self.metrics, "toy")
        self.engine = make_engine(**options)
        self.observer.engine_ready()
        self.observer.take_stats(self.engine.stats())

    def step(self, answers):
        events = self.engine.step()
        answers.take(events)
        self.observer.take_events(events)

    def drain(self):
        answers = Answers()
        while self.engine.has_work():
            self.step(answers)
        self.observer.take_stats(self.engine.stats())
        return answers

    def scrape(self):
        return Scrape(self.metrics.render("")[0].decode())


def test_counters_add_up_to_what_clients_got_and_gauges_go_back_to_zero():
    observed = Observed()
    for i, n in enumerate((1, 3, 1)):
        observed.engine.submit(request(f"r{i}", [7] * 9, n=n, ignore_eos=True, max_tokens=5 + i))
    observed.step(Answers())
    observed.observer.take_stats(observed.engine.stats())
    assert observed.scrape().value("num_requests_running") >= 1
    observed.drain()
    scrape = observed.scrape()
    assert scrape.value("prompt_tokens_total", model_name="toy") == 3 * 9
    assert scrape.value("generation_tokens_total") == 5 + 3 * 6 + 7
    assert scrape.value("request_success_total", finished_reason="length") == 5
    assert scrape.value("time_to_first_token_seconds_count") == 5
    assert scrape.value("request_queue_time_seconds_count") == 5
    assert scrape.value("e2e_request_latency_seconds_count") == 5
    assert scrape.value("inter_token_latency_seconds_count") == 4 + 3 * 5 + 6
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_blocks_referenced", "kv_cache_usage_perc"):
        assert scrape.value(gauge) == 0, gauge
    assert scrape.value("kv_blocks_total") == 200
    assert scrape.value("kv_blocks_cached") == observed.engine.cache.pool.num_cached > 0


def test_the_prefix_cache_counts_a_prompt_once_however_often_it_is_preempted():
    observed = Observed(num_pages=14, budget=16, max_model_len=48, max_num_seqs=16)
    for i in range(16):
        observed.engine.submit(request(f"r{i}", [i + 1] * (5 + i), ignore_eos=True, max_tokens=20, n=1 + i % 2))
    observed.drain()
    scrape = observed.scrape()
    assert scrape.value("num_preemptions_total") == observed.engine.num_preemptions > 0
    assert scrape.value("prefix_cache_queries_total") == sum(5 + i for i in range(16))
    assert scrape.value("prefix_cache_hits_total") == 0


def test_prefix_hits_are_tokens_that_were_not_computed():
    observed = Observed()
    for name in ("first", "second"):
        observed.engine.submit(request(name, range(1, 14), max_tokens=1))
        answers = observed.drain()
    assert observed.scrape().value("prefix_cache_queries_total") == 26
    assert observed.scrape().value("prefix_cache_hits_total") == answers["second", 0].last.metrics.cached_tokens == 12


def test_without_a_prefix_cache_nothing_is_looked_up():
    observed = Observed(enable_prefix_caching=False)
    observed.engine.submit(request("r", range(1, 14), max_tokens=1))
    observed.drain()
    assert observed.scrape().value("prefix_cache_queries_total") == 0


@pytest.mark.parametrize("depth", [1, 4])
def test_drafts_are_counted_by_drafter_and_by_position(depth):
    plain = alone(request("r", [1, 2], ignore_eos=True, max_tokens=30))["r", 0].token_ids
    dice = random.Random(1)
    right = [dice.random() < 0.7 for _ in range(32)]

    def draft(sequence, tokens):
        place = len(tokens) - 2
        return plain[place] if right[place] else (plain[place] + 1) % VOCAB

    drafter = ScriptedDrafter(draft, name="half-right")
    observed = Observed(drafter=drafter, depth_policy=FixedDepth(depth))
    observed.engine.submit(request("r", [1, 2], ignore_eos=True, max_tokens=30))
    accepted_by_hand, drafted_by_hand, windows, depths_by_hand = [0] * depth, 0, 0, [0] * (depth + 1)
    parts_by_hand = StepSeconds()
    answers = Answers()
    while observed.engine.has_work():
        observed.step(answers)
        (output,) = observed.engine.last_output.step.outputs
        parts_by_hand += observed.engine.last_output.timing
        assert observed.engine.last_output.accepted_tokens == [output.token_ids]
        depths_by_hand[output.num_draft_tokens] += len(output.token_ids) > 0
        drafted_by_hand += output.num_draft_tokens
        windows += output.num_draft_tokens > 0
        for position in range(len(output.token_ids) - 1):
            accepted_by_hand[position] += 1
    observed.drain()
    assert answers["r", 0].token_ids == plain
    scrape = observed.scrape()
    assert scrape.value("spec_decode_num_drafts_total", drafter="half-right") == windows > 0
    assert scrape.value("spec_decode_num_draft_tokens_total", drafter="half-right") == drafted_by_hand
    assert scrape.value("spec_decode_num_accepted_tokens_total", drafter="half-right") == sum(accepted_by_hand) > 0
    for position, accepted in enumerate(accepted_by_hand):
        found = scrape.value("spec_decode_num_accepted_tokens_per_pos_total", position=str(position))
        assert found == accepted, position
    assert scrape.value("spec_decode_depth_count") == sum(depths_by_hand)
    assert scrape.value("spec_decode_depth_sum") == drafted_by_hand
    assert scrape.value("spec_decode_depth_bucket", le="0.0") == depths_by_hand[0]
    for part in ("draft", "verify", "sample"):
        seconds = getattr(parts_by_hand, f"{part}_s")
        assert scrape.value("step_seconds_total", part=part) == pytest.approx(seconds)
        assert seconds > 0
    # The request is told the same.
    told = answers["r", 0].last.metrics
    counts = told.drafts["half-right"]
    assert (counts.num_drafts, counts.num_draft_tokens) == (windows, told.draft_tokens) == (windows, drafted_by_hand)
    assert counts.accepted_per_position == accepted_by_hand[: len(counts.accepted_per_position)]
    assert sum(counts.accepted_per_position) == sum(accepted_by_hand) == told.accepted_tokens
    assert told.depths == depths_by_hand[: len(told.depths)]
    assert told.step_time.verify_s == pytest.approx(parts_by_hand.verify_s)
    # Tokens accepted together came at one time: gaps are between steps.
    assert scrape.value("inter_token_latency_seconds_count") < 29


def test_counters_of_a_new_engine_are_added_to_those_of_the_one_that_died():
    def right(sequence, tokens):
        return 3

    options = {"drafter": ScriptedDrafter(right), "depth_policy": FixedDepth(2)}
    crowd = {"num_pages": 14, "max_model_len": 48, "max_num_seqs": 16}
    before = Observed(**options, **crowd)
    for i in range(16):
        before.engine.submit(request(f"r{i}", [i + 1] * 9, ignore_eos=True, max_tokens=20))
    for _ in range(60):
        before.step(Answers())
    before.observer.take_stats(before.engine.stats())
    died = before.scrape()
    assert died.value("num_preemptions_total") > 0
    assert died.value("kv_blocks_referenced") > 0
    before.observer.engine_gone()
    before.observer.lose(4)
    gone = before.scrape()
    assert gone.value("kv_blocks_referenced") == gone.value("num_requests_running") == 0
    assert gone.value("num_preemptions_total") == died.value("num_preemptions_total")
    assert gone.value("request_success_total", finished_reason="error") == 4

    after = Observed(before.observer, **options)
    assert after.scrape().value("engine_restarts_total") == 1
    after.engine.submit(request("again", [1, 2], ignore_eos=True, max_tokens=9))
    after.drain()
    scrape = after.scrape()
    assert scrape.value("generation_tokens_total") == died.value("generation_tokens_total") + 9
    drafts = after.engine.stats().drafts["scripted"].num_draft_tokens
    assert (
        scrape.value("spec_decode_num_draft_tokens_total") == died.value("spec_decode_num_draft_tokens_total") + drafts
    )
    assert scrape.value("num_preemptions_total") == died.value("num_preemptions_total")


def test_what_an_engine_did_to_warm_up_counts_as_nobodys():
    drafter = ScriptedDrafter(lambda sequence, tokens: 3)
    engine = make_engine(drafter=drafter, depth_policy=FixedDepth(2))
    metrics = Metrics()
    observer = EngineObserver(metrics, "toy")
    for name in ("warm-up", "first"):
        engine.submit(request(name, [1, 2], ignore_eos=True))
        drain(engine)
        observer.take_stats(engine.stats())
        drafted = engine.stats().drafts["scripted"].num_draft_tokens
        counted = Scrape(metrics.render("")[0].decode()).value("spec_decode_num_draft_tokens_total")
        if name == "warm-up":
            assert counted == 0
            warm_up = drafted
    assert counted == drafted - warm_up > 0


def test_an_aborted_sequence_is_an_abort_and_no_latency():
    observed = Observed()
    observed.engine.submit(request("r", [1, 2, 3], ignore_eos=True, max_tokens=50))
    for _ in range(5):
        observed.step(Answers())
    observed.engine.cancel("r")
    observed.drain()
    scrape = observed.scrape()
    assert scrape.value("request_success_total", finished_reason="abort") == 1
    assert scrape.value("generation_tokens_total") == 5
    assert scrape.value("e2e_request_latency_seconds_count") == 0
    assert scrape.value("inter_token_latency_seconds_count") == 4


def test_buckets_hold_what_they_say():
    metrics = Metrics()
    observer = EngineObserver(metrics, "m")
    figures = SequenceMetrics(
        queue_time_s=0.0,
        time_to_first_token_s=0.5,
        token_times_s=[0.5, 0.51, 0.51, 0.53, 9.0],
        total_time_s=9.5,
        prompt_tokens=1,
        output_tokens=5,
        cached_tokens=0,
    )
    observer.take_events(
        [TokenEvent(request_id="r", index=0, token_ids=[1] * 5, finish_reason="stop", metrics=figures)]
    )
    scrape = Scrape(metrics.render("")[0].decode())
    by_bound = {le: scrape.value("inter_token_latency_seconds_bucket", le=le) for le in ("0.0075", "0.015", "0.03")}
    assert by_bound == {"0.0075": 0, "0.015": 1, "0.03": 2}
    assert scrape.value("inter_token_latency_seconds_bucket", le="5.0") == 2
    assert scrape.value("inter_token_latency_seconds_bucket", le="+Inf") == 3
    assert scrape.value("inter_token_latency_seconds_sum") == pytest.approx(8.5)
    assert scrape.value("e2e_request_latency_seconds_bucket", le="10.0") == 1


@given(st.lists(st.lists(st.sampled_from([0.0, 0.0005, 0.001, 0.0025, 0.01, 4.99, 5.0, 5.01, 700.0]), max_size=9)))
def test_values_taken_at_once_are_counted_as_the_library_counts_them_one_by_one(batches):
    bounds = (0.001, 0.0025, 0.01, 5.0)
    at_once, registry = BulkHistogram("h", "text", ("who",), bounds), CollectorRegistry()
    one_by_one = Histogram("h", "text", ("who",), buckets=bounds, registry=registry)
    one_by_one.labels("me")
    at_once.observe(("me",), ())
    for batch in batches:
        at_once.observe(("me",), batch)
        for value in batch[:2]:
            at_once.observe_one(("me",), value)
            one_by_one.labels("me").observe(value)
        for value in batch:
            one_by_one.labels("me").observe(value)
    (expected,), (found,) = registry.collect(), at_once.collect()
    expected_values = {
        (s.name, s.labels.get("le")): s.value for s in expected.samples if not s.name.endswith("_created")
    }
    assert {(s.name, s.labels.get("le")): pytest.approx(s.value) for s in found.samples} == expected_values
