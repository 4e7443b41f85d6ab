"""One stream of tokens being generated, and how far its computation has come.

State and what can be read off it; who changes it is the scheduler.  Knows nothing about blocks (the cache has
them under the sequence's key) or text (its stop condition does).
"""

from dataclasses import dataclass, field
from time import monotonic

from helix_gateway.core.event import FinishReason, SequenceMetrics, SequenceStart, TokenLogprobs
from helix_gateway.core.protocols import StopCondition, TokenConstraint
from helix_gateway.core.request import Request
from helix_gateway.core.stats import StepSeconds
from helix_gateway.engine.draft_ledger import DraftLedger
from helix_gateway.engine.option_records import option_record
from helix_gateway.engine.token_edits import TokenEdits

SequenceKey = tuple[str, int]
_NO_STEPS = StepSeconds()
PREDICTION = "prediction"
"""The source of drafts that is the request's own prediction: clients are told what came of it."""


@dataclass(slots=True)
class Timeline:
    """When things happened to a sequence, in seconds of the monotonic clock."""

    arrival: float
    first_scheduled: float | None = None
    steps_before: StepSeconds = _NO_STEPS
    """What the engine's steps had taken until then."""
    tokens: list[float] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Sequence:
    """Choice ``index`` of a Request.

    ``num_computed_tokens`` tries to catch up with ``token_ids`` plus draft tokens: that covers chunked prefill,
    prefix hits, preemption and speculation alike.
    """

    request: Request
    index: int
    arrival_order: int
    stop_ids: frozenset[int]
    """Tokens that end it: EOS unless ignored, and the request's own."""
    stop: StopCondition | None
    constraint: TokenConstraint | None
    timeline: Timeline
    key: SequenceKey = field(init=False)
    """Names it in the cache."""
    num_prompt_tokens: int = field(init=False)
    wants_prompt_logprobs: bool = field(init=False)
    """Whether the prompt's positions are to be scored, by this sequence."""
    option_record: bytes = field(init=False)
    """How its rows are sampled, see `option_records`."""
    token_ids: list[int] = field(init=False)
    """Prompt and output, verified tokens only."""
    edits: TokenEdits = field(init=False)
    num_computed_tokens: int = 0
    num_queried_tokens: int = 0
    """Prompt tokens looked up in the prefix cache."""
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    ledger: DraftLedger = field(default_factory=DraftLedger)
    num_lately_drafted: int = 0
    """Draft tokens that were verified with its newest token."""
    lacked_room_for_drafts: bool = False
    """Whether it would have been drafted for at the last step, had prompts left it a token."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_prediction_tokens: int = 0
    num_rejected_prediction_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        params = self.request.sampling
        self.key = (self.request.request_id, self.index)
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.wants_prompt_logprobs = params.prompt_logprobs is not None and self.index == 0
        self.option_record = option_record(params, self.index)
        self.token_ids = list(self.request.prompt_token_ids)
        self.edits = TokenEdits(params, self.token_ids, self.stop_ids)
        if self.wants_prompt_logprobs:
            self.prompt_logprobs.append(None)

    def append(self, token_ids: list[int], now: float) -> None:
        """Take tokens that were verified at the moment ``now``, on the clock of its `Timeline`."""
        self.token_ids += token_ids
        for token in token_ids:
            self.edits.advance(token)
            if self.constraint is not None:
                self.constraint.advance(token)
            self.timeline.tokens.append(now)

    def count_draft(self, source: str | None, drafted: int, accepted: int) -> None:
        """Keep account of what came of one window, drafted for or not."""
        self.ledger.count(source, drafted, accepted)
        self.num_lately_drafted = drafted
        self.num_draft_tokens += drafted
        self.num_accepted_tokens += accepted
        if source == PREDICTION:
            self.num_accepted_prediction_tokens += accepted
            self.num_rejected_prediction_tokens += drafted - accepted

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller is served first and preempted last."""
        return (self.request.priority, self.arrival_order)

    @property
    def num_output_tokens(self) -> int:
        """Verified tokens after the prompt."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Verified tokens that have no KV yet; at least one, whose logits give the next token."""
        return len(self.token_ids) - self.num_computed_tokens

    def start(self) -> SequenceStart:
        """What is known of it once it has a token."""
        arrival, started = self.timeline.arrival, self.timeline.first_scheduled
        return SequenceStart(
            queue_time_s=0.0 if started is None else started - arrival,
            time_to_first_token_s=self.timeline.tokens[0] - arrival,
            prompt_tokens=self.num_prompt_tokens,
            queried_tokens=self.num_queried_tokens,
            cached_tokens=self.num_cached_tokens,
        )

    def metrics(self, steps: StepSeconds) -> SequenceMetrics:
        """Its figures so far.

        Args:
            steps: what the engine's steps have taken until now.
        """
        arrival = self.timeline.arrival
        started = self.timeline.first_scheduled
        times = [moment - arrival for moment in self.timeline.tokens]
        return SequenceMetrics(
            queue_time_s=0.0 if started is None else started - arrival,
            time_to_first_token_s=times[0] if times else None,
            token_times_s=times,
            total_time_s=monotonic() - arrival,
            prompt_tokens=self.num_prompt_tokens,
            output_tokens=self.num_output_tokens,
            cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
            draft_tokens=self.num_draft_tokens,
            accepted_tokens=self.num_accepted_tokens,
            accepted_prediction_tokens=self.num_accepted_prediction_tokens,
            rejected_prediction_tokens=self.num_rejected_prediction_tokens,
            drafts=self.ledger.counts(),
            depths=self.ledger.depths(),
            step_time=_NO_STEPS if started is None else steps - self.timeline.steps_before,
        )
