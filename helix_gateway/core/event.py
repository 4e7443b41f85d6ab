"""What the engine tells about a sequence, step by step: the words that cross back to the service.

Knows nothing about text.  An event holds only what is new since the last one of the same sequence.
"""

from typing import Literal

import msgspec

from helix_gateway.core.stats import DraftCounts, StepSeconds

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorKind = Literal["out_of_memory", "failed"]


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, from the raw distribution (before temperature, bias, penalties)."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top_ids: list[int]
    top_logprobs: list[float]


class SequenceMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one finished sequence; times are seconds, measured where tokens are committed."""

    queue_time_s: float
    """From arrival at the engine to the first step that computes something of it."""
    time_to_first_token_s: float | None
    """From arrival at the engine to the commit of the first token; None if there was none."""
    token_times_s: list[float]
    """From arrival to the commit of each token; tokens accepted in one step share their time."""
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV was found and not computed."""
    total_time_s: float | None = None
    """From arrival at the engine to the end; None where nobody measured it."""
    num_preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_prediction_tokens: int = 0
    """Of the accepted ones those that came from the request's prediction."""
    rejected_prediction_tokens: int = 0
    drafts: dict[str, DraftCounts] = {}
    """What came of drafts, by drafter; what was right but lies behind a stop is not among the accepted."""
    depths: list[int] = []
    """How many of its steps verified so many draft tokens, from 0 on."""
    step_time: StepSeconds = StepSeconds()
    """What the steps from its first to its last took; others of the batch shared them."""


class SequenceStart(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one sequence that are known with its first token; times are seconds, as in `SequenceMetrics`."""

    queue_time_s: float
    time_to_first_token_s: float
    prompt_tokens: int
    queried_tokens: int
    """Prompt tokens that were looked up in the prefix cache."""
    cached_tokens: int


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens committed for one sequence at one step, and how it ended if it did.

    A stop token is looked for before appending and is never among ``token_ids``.
    """

    request_id: str
    index: int
    """Which of the Request's n choices."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One per token of ``token_ids``, where asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One per prompt token (None for the first), with the first event of index 0, where asked for; between processes,
    parts of them may come ahead in events of their own, without tokens."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token's id or the stop string that ended it; None for EOS, length and abort."""
    error: str | None = None
    """One clear line, with finish_reason "error"."""
    error_kind: ErrorKind | None = None
    """Whether trying again could help ("failed") or not ("out_of_memory"), with finish_reason "error"."""
    start: SequenceStart | None = None
    """With the first tokens of the sequence."""
    metrics: SequenceMetrics | None = None
    """With the last event of the sequence."""
