"""One model's figures for `/metrics`: the engine's events and stats, added to what this process has counted.

An engine counts from zero; after a restart its counts are added to those of the engines before it, so nothing that is
scraped as a counter ever goes down.  Everything is counted here and nowhere else.  Knows nothing about HTTP.
"""

from collections.abc import Iterable

import numpy as np
from prometheus_client import Counter

from helix_gateway.core.event import SequenceMetrics, SequenceStart, TokenEvent
from helix_gateway.core.stats import DraftCounts, EngineStats, StepSeconds
from helix_gateway.telemetry import catalogue
from helix_gateway.telemetry.metrics import Metrics

_NO_DRAFTS = DraftCounts(num_drafts=0, num_draft_tokens=0, num_accepted_tokens=0, accepted_per_position=[])


class EngineObserver:
    """Keeps the metrics of one served model.

    Args:
        metrics: the server's families.
        model_name: what the model is called there.
    """

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        self._metrics = metrics
        self._model = model_name
        self._labels = (model_name,)
        self._previous: EngineStats | None = None
        self._started = False
        self._generation_tokens = metrics.counter(catalogue.GENERATION_TOKENS, model_name)
        self._prompt_tokens = metrics.counter(catalogue.PROMPT_TOKENS, model_name)
        self._queries = metrics.counter(catalogue.PREFIX_CACHE_QUERIES, model_name)
        self._hits = metrics.counter(catalogue.PREFIX_CACHE_HITS, model_name)
        self._preemptions = metrics.counter(catalogue.NUM_PREEMPTIONS, model_name)
        self._restarts = metrics.counter(catalogue.ENGINE_RESTARTS, model_name)
        self._ended = {reason: self._ended_by(reason) for reason in ("stop", "length", "abort", "error")}
        for definition in catalogue.ENGINE_METRICS:
            if definition.kind == "histogram":
                metrics.histogram(definition).observe(self._labels, ())
        self._zero_gauges()

    def _ended_by(self, reason: str) -> Counter:
        return self._metrics.counter(catalogue.REQUEST_SUCCESS, self._model, reason)

    # --- what happens to sequences

    def take_events(self, events: Iterable[TokenEvent]) -> None:
        """Count what a step had to tell."""
        tokens = 0
        for event in events:
            tokens += len(event.token_ids)
            if event.start is not None:
                self._take_start(event.start, event.index)
            if event.finish_reason is not None:
                self._ended[event.finish_reason].inc()
            if event.metrics is not None:
                self._take_metrics(event.metrics, event.finish_reason)
        self._generation_tokens.inc(tokens)

    def _take_start(self, start: SequenceStart, index: int) -> None:
        self._observe(catalogue.QUEUE_TIME, start.queue_time_s)
        self._observe(catalogue.TIME_TO_FIRST_TOKEN, start.time_to_first_token_s)
        if index == 0:
            # A request's other choices share its prompt.
            self._prompt_tokens.inc(start.prompt_tokens)
            self._queries.inc(start.queried_tokens)
            self._hits.inc(start.cached_tokens)

    def _take_metrics(self, metrics: SequenceMetrics, finish_reason: str | None) -> None:
        if finish_reason in ("stop", "length") and metrics.total_time_s is not None:
            self._observe(catalogue.E2E_LATENCY, metrics.total_time_s)
        gaps = np.diff(np.sort(metrics.token_times_s))
        # Tokens of one step came at once.
        self._metrics.histogram(catalogue.INTER_TOKEN_LATENCY).observe(self._labels, gaps[gaps > 0])

    def _observe(self, definition: catalogue.Definition, value: float) -> None:
        self._metrics.histogram(definition).observe_one(self._labels, value)

    def lose(self, num_sequences: int) -> None:
        """Count sequences whose engine died under them."""
        self._ended["error"].inc(num_sequences)

    # --- what happens to the engine

    def engine_ready(self) -> None:
        """A new engine counts from zero."""
        if self._started:
            self._restarts.inc()
        self._started = True
        self._previous = None

    def engine_gone(self) -> None:
        """What the engine held is gone with it; what it counted stays."""
        self._zero_gauges()

    def take_stats(self, stats: EngineStats) -> None:
        """Show the engine as it is; the first report of an engine is where its counts begin."""
        previous, self._previous = self._previous or stats, stats
        self._show(stats)
        self._preemptions.inc(stats.num_preemptions - previous.num_preemptions)
        for drafter, counts in stats.drafts.items():
            self._add_drafts(drafter, previous.drafts.get(drafter, _NO_DRAFTS), counts)
        self._add_depths(previous.depths, stats.depths)
        self._add_step_time(stats.step_time - previous.step_time)

    def _show(self, stats: EngineStats) -> None:
        usage = stats.kv_blocks_referenced / max(1, stats.kv_blocks_total)
        self._set(catalogue.NUM_REQUESTS_RUNNING, stats.num_running)
        self._set(catalogue.NUM_REQUESTS_WAITING, stats.num_waiting)
        self._set(catalogue.KV_CACHE_USAGE, usage)
        self._set(catalogue.KV_BLOCKS_REFERENCED, stats.kv_blocks_referenced)
        self._set(catalogue.KV_BLOCKS_CACHED, stats.kv_blocks_cached)
        self._set(catalogue.KV_BLOCKS_TOTAL, stats.kv_blocks_total)

    def _zero_gauges(self) -> None:
        for definition in catalogue.ENGINE_METRICS:
            if definition.kind == "gauge":
                self._set(definition, 0)

    def _set(self, definition: catalogue.Definition, value: float) -> None:
        self._metrics.gauge(definition, self._model).set(value)

    def _add_drafts(self, drafter: str, before: DraftCounts, now: DraftCounts) -> None:
        for definition, grown in (
            (catalogue.SPEC_NUM_DRAFTS, now.num_drafts - before.num_drafts),
            (catalogue.SPEC_NUM_DRAFT_TOKENS, now.num_draft_tokens - before.num_draft_tokens),
            (catalogue.SPEC_NUM_ACCEPTED, now.num_accepted_tokens - before.num_accepted_tokens),
        ):
            self._metrics.counter(definition, self._model, drafter).inc(grown)
        for position, accepted in enumerate(now.accepted_per_position):
            known = before.accepted_per_position[position] if position < len(before.accepted_per_position) else 0
            series = self._metrics.counter(catalogue.SPEC_ACCEPTED_PER_POS, self._model, drafter, str(position))
            series.inc(accepted - known)

    def _add_depths(self, before: list[int], now: list[int]) -> None:
        grown = np.array(now, np.int64)
        grown[: len(before)] -= np.array(before, np.int64)
        depths = np.repeat(np.arange(len(grown), dtype=np.float64), grown)
        self._metrics.histogram(catalogue.SPEC_DEPTH).observe(self._labels, depths)

    def _add_step_time(self, grown: StepSeconds) -> None:
        parts = (("draft", grown.draft_s), ("verify", grown.verify_s), ("sample", grown.sample_s))
        for part, seconds in parts:
            self._metrics.counter(catalogue.STEP_SECONDS_BY_PART, self._model, part).inc(seconds)
