"""Every metric of `/metrics`: its name, type, labels, unit and meaning, and what to ask of it.

Names are those that dashboards for language-model servers already know, with the prefix ``helix:``.  The families
are built from these definitions (`metrics.py`), and so is `docs/metrics.md` (`scripts/write_metrics_doc.py`).
Knows nothing about who counts.
"""

from dataclasses import dataclass
from typing import Literal

PREFIX = "helix:"

Kind = Literal["gauge", "counter", "histogram"]

STEP_SECONDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0,
)  # fmt: skip
"""Between two steps: 3 ms on one H200, 10 to 100 ms on a laptop, seconds where long prompts come between."""
WAIT_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0,
)  # fmt: skip
"""Until a first token: milliseconds for a short prompt on a GPU, minutes for a long one on a laptop."""
REQUEST_SECONDS = (
    0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
"""Whole answers: a word on a GPU to a book on a laptop."""
DEPTH_TOKENS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

_MODEL = ("model_name",)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Definition:
    """One metric family."""

    name: str
    """Without prefix, and without the ``_total`` that counters end with on the wire."""
    kind: Kind
    meaning: str
    unit: str
    labels: tuple[str, ...] = _MODEL
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, without the infinite one."""
    query: str = ""
    """PromQL worth having on a dashboard."""

    @property
    def wire_name(self) -> str:
        """As it is scraped."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"


NUM_REQUESTS_RUNNING = Definition(
    name="num_requests_running",
    kind="gauge",
    unit="sequences",
    meaning="Sequences in the batch now; a request with n = 3 is three of them.",
    query="sum by (model_name) (helix:num_requests_running)",
)
NUM_REQUESTS_WAITING = Definition(
    name="num_requests_waiting",
    kind="gauge",
    unit="sequences",
    meaning="Sequences whose turn has not come, or that were preempted and wait to be computed again. "
    "Above 0 for long: the server is full.",
    query="avg_over_time(helix:num_requests_waiting[5m])",
)
KV_CACHE_USAGE = Definition(
    name="kv_cache_usage_perc",
    kind="gauge",
    unit="0 to 1",
    meaning="Share of the KV cache's blocks that sequences hold. Near 1, sequences are preempted.",
    query="max_over_time(helix:kv_cache_usage_perc[5m])",
)
KV_BLOCKS_REFERENCED = Definition(
    name="kv_blocks_referenced", kind="gauge", unit="blocks", meaning="Blocks of the KV cache that sequences hold."
)
KV_BLOCKS_CACHED = Definition(
    name="kv_blocks_cached",
    kind="gauge",
    unit="blocks",
    meaning="Blocks that nobody holds but whose content a later prompt can still find; given away when memory is short.",
)
KV_BLOCKS_TOTAL = Definition(
    name="kv_blocks_total", kind="gauge", unit="blocks", meaning="Blocks that the KV cache has."
)
PREFIX_CACHE_QUERIES = Definition(
    name="prefix_cache_queries",
    kind="counter",
    unit="tokens",
    meaning="Prompt tokens that were looked up in the prefix cache. A request counts once, whatever its n and however "
    "often it was preempted.",
)
PREFIX_CACHE_HITS = Definition(
    name="prefix_cache_hits",
    kind="counter",
    unit="tokens",
    meaning="Of those, tokens whose KV was found and not computed.",
    query="rate(helix:prefix_cache_hits_total[5m]) / rate(helix:prefix_cache_queries_total[5m])",
)
PROMPT_TOKENS = Definition(
    name="prompt_tokens",
    kind="counter",
    unit="tokens",
    meaning="Prompt tokens, found or computed, counted when the request's first token comes; once, whatever its n.",
    query="rate(helix:prompt_tokens_total[1m])",
)
GENERATION_TOKENS = Definition(
    name="generation_tokens",
    kind="counter",
    unit="tokens",
    meaning="Tokens generated, of all choices, counted as they come.",
    query="rate(helix:generation_tokens_total[1m])",
)
REQUEST_SUCCESS = Definition(
    name="request_success",
    kind="counter",
    unit="sequences",
    labels=(*_MODEL, "finished_reason"),
    meaning="Sequences that ended, by reason: `stop`, `length`, `abort` (the client left) and `error` (the engine "
    "failed or died under it).",
    query="sum by (finished_reason) (rate(helix:request_success_total[5m]))",
)
NUM_PREEMPTIONS = Definition(
    name="num_preemptions",
    kind="counter",
    unit="preemptions",
    meaning="How often a sequence had to give its blocks back before its end, to be computed again.",
    query="rate(helix:num_preemptions_total[5m])",
)
TIME_TO_FIRST_TOKEN = Definition(
    name="time_to_first_token_seconds",
    kind="histogram",
    unit="seconds",
    buckets=WAIT_SECONDS,
    meaning="From a sequence's arrival at the engine to the commit of its first token; observed when that token comes.",
    query="histogram_quantile(0.95, sum by (le, model_name) (rate(helix:time_to_first_token_seconds_bucket[5m])))",
)
INTER_TOKEN_LATENCY = Definition(
    name="inter_token_latency_seconds",
    kind="histogram",
    unit="seconds",
    buckets=STEP_SECONDS,
    meaning="Between two steps that gave a sequence tokens, as committed by the engine (tokens accepted in one step "
    "come together); observed when the sequence ends.",
    query="histogram_quantile(0.99, sum by (le, model_name) (rate(helix:inter_token_latency_seconds_bucket[5m])))",
)
E2E_LATENCY = Definition(
    name="e2e_request_latency_seconds",
    kind="histogram",
    unit="seconds",
    buckets=REQUEST_SECONDS,
    meaning="From a sequence's arrival at the engine to its end, of those that ended by `stop` or `length`.",
    query="histogram_quantile(0.95, sum by (le, model_name) (rate(helix:e2e_request_latency_seconds_bucket[5m])))",
)
QUEUE_TIME = Definition(
    name="request_queue_time_seconds",
    kind="histogram",
    unit="seconds",
    buckets=WAIT_SECONDS,
    meaning="From a sequence's arrival at the engine to the first step that computed something of it; observed when "
    "its first token comes.",
    query="histogram_quantile(0.95, sum by (le, model_name) (rate(helix:request_queue_time_seconds_bucket[5m])))",
)
SPEC_NUM_DRAFTS = Definition(
    name="spec_decode_num_drafts",
    kind="counter",
    unit="drafts",
    labels=(*_MODEL, "drafter"),
    meaning="Windows verified: a sequence's drafts at one step count once.",
)
SPEC_NUM_DRAFT_TOKENS = Definition(
    name="spec_decode_num_draft_tokens",
    kind="counter",
    unit="tokens",
    labels=(*_MODEL, "drafter"),
    meaning="Tokens that were drafted and verified.",
)
SPEC_NUM_ACCEPTED = Definition(
    name="spec_decode_num_accepted_tokens",
    kind="counter",
    unit="tokens",
    labels=(*_MODEL, "drafter"),
    meaning="Draft tokens that were what the target chose.",
    query="sum by (drafter) (rate(helix:spec_decode_num_accepted_tokens_total[5m])) "
    "/ sum by (drafter) (rate(helix:spec_decode_num_draft_tokens_total[5m]))",
)
SPEC_ACCEPTED_PER_POS = Definition(
    name="spec_decode_num_accepted_tokens_per_pos",
    kind="counter",
    unit="tokens",
    labels=(*_MODEL, "drafter", "position"),
    meaning="Accepted draft tokens by their place in the draft, from 0. Divided by the drafts: how often so many "
    "were right in a row.",
    query="sum by (position) (rate(helix:spec_decode_num_accepted_tokens_per_pos_total[5m])) "
    "/ ignoring (position) group_left sum (rate(helix:spec_decode_num_drafts_total[5m]))",
)
SPEC_DEPTH = Definition(
    name="spec_decode_depth",
    kind="histogram",
    unit="tokens",
    buckets=DEPTH_TOKENS,
    meaning="Draft tokens verified for a sequence at a step, each time that a step gave it a token; 0: nothing was "
    "drafted that seemed worth it, and the step was a plain one for it.",
    query="rate(helix:spec_decode_depth_sum[5m]) / rate(helix:spec_decode_depth_count[5m])",
)
STEP_SECONDS_BY_PART = Definition(
    name="step_seconds",
    kind="counter",
    unit="seconds",
    labels=(*_MODEL, "part"),
    meaning="Time in the engine's steps, by part: `draft` (drafters, and choosing what is verified), `verify` (the "
    "model's forward, plain steps and prompts included, with how each row is to be sampled) and `sample` (a token for "
    "each row, and which drafts agree).",
    query="sum by (part) (rate(helix:step_seconds_total[5m]))",
)
ENGINE_STATE = Definition(
    name="engine_state",
    kind="gauge",
    unit="0 or 1",
    labels=(*_MODEL, "state"),
    meaning="1 for the state that the engine is in: `starting`, `ready`, `restarting` or `stopped`.",
    query='min_over_time(helix:engine_state{state="ready"}[5m])',
)
ENGINE_RESTARTS = Definition(
    name="engine_restarts",
    kind="counter",
    unit="restarts",
    meaning="How often an engine that had died or hung was replaced.",
    query="increase(helix:engine_restarts_total[1h])",
)
HTTP_REQUESTS = Definition(
    name="http_requests",
    kind="counter",
    unit="requests",
    labels=("method", "route", "status"),
    meaning="HTTP requests answered, by route (without `/v1`; `other` where there is none) and status; 499: the client "
    "left before it had an answer.",
    query='sum by (status) (rate(helix:http_requests_total{status=~"4..|5.."}[5m]))',
)
LOOP_LAG = Definition(
    name="gateway_event_loop_lag_seconds",
    kind="histogram",
    unit="seconds",
    labels=(),
    buckets=LAG_SECONDS,
    meaning="How late the gateway's event loop comes to what is due, sampled four times a second. Over 5 ms often: the "
    "gateway's process is short of CPU.",
    query="histogram_quantile(0.99, sum by (le) (rate(helix:gateway_event_loop_lag_seconds_bucket[5m])))",
)

ENGINE_METRICS = (
    NUM_REQUESTS_RUNNING,
    NUM_REQUESTS_WAITING,
    KV_CACHE_USAGE,
    KV_BLOCKS_REFERENCED,
    KV_BLOCKS_CACHED,
    KV_BLOCKS_TOTAL,
    PREFIX_CACHE_QUERIES,
    PREFIX_CACHE_HITS,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    REQUEST_SUCCESS,
    NUM_PREEMPTIONS,
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    E2E_LATENCY,
    QUEUE_TIME,
    SPEC_NUM_DRAFTS,
    SPEC_NUM_DRAFT_TOKENS,
    SPEC_NUM_ACCEPTED,
    SPEC_ACCEPTED_PER_POS,
    SPEC_DEPTH,
    STEP_SECONDS_BY_PART,
)
"""What the engine does."""
SERVER_METRICS = (ENGINE_STATE, ENGINE_RESTARTS, HTTP_REQUESTS, LOOP_LAG)
"""What the server around it does."""
