"""The engine: requests in, token events out, one step at a time.

    plan   = scheduler.schedule()
    output = decoder.speculative_decode_step(plan)
    events = self._commit(output)

A sequence joins at the next step after it arrives and leaves at the step in which it stops; whatever ends it,
its blocks go back.  Not thread-safe: whoever owns an engine calls it from one thread.  Knows nothing about text,
HTTP, processes or devices.
"""

from collections.abc import Hashable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Generic

import structlog

from helix_gateway.core.errors import ContextLengthError, InvalidRequestError, OutOfMemoryError, QueueFullError
from helix_gateway.core.event import ErrorKind, FinishReason, TokenEvent
from helix_gateway.core.protocols import Logits, ModelRunner, StopCondition, TokenConstraint
from helix_gateway.core.request import Request
from helix_gateway.core.stats import EngineStats, StepSeconds
from helix_gateway.engine.admission import check_request
from helix_gateway.engine.decoder import AdaptiveSpeculativeDecoder
from helix_gateway.engine.depth import DepthPolicy, FixedDepth
from helix_gateway.engine.drafters.base import Drafter
from helix_gateway.engine.drafters.chain import CostlyDrafter
from helix_gateway.engine.drafters.none import NoDrafter
from helix_gateway.engine.ending import Ending, find_ending
from helix_gateway.engine.events import end_event, explained, step_event
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.plan import SequenceOutput, SpeculativeOutput, StepPlan
from helix_gateway.engine.scheduler import PlanningError, Scheduler
from helix_gateway.engine.sequence import Sequence, Timeline
from helix_gateway.engine.step_budget import StepBudget
from helix_gateway.engine.token_masks import ConstraintFailedError

log = structlog.get_logger(__name__)

_RETRY_AFTER_FULL_QUEUE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds of the engine's work."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queue_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceHooks:
    """What only other rooms understand of one choice of a request."""

    stop: StopCondition | None = None
    constraint: TokenConstraint | None = None


class Engine(Generic[Logits]):
    """One model's continuous batch.

    Args:
        runner: the model on its device.
        cache: of the pool that the runner's pages are from, where other models draw from it too (no request id may
            then be known to two engines); None: one of its own.
        limits: bounds; a ``max_model_len`` beyond what the pool can hold is lowered to that.
        eos_token_ids: tokens that end any sequence which does not ignore them.
        drafter, depth_policy: who drafts, and how much; by default nobody, nothing.
        costly_drafter: who drafts beside, where that pays.
    """

    def __init__(
        self,
        runner: ModelRunner[Logits],
        limits: EngineLimits,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        enable_prefix_caching: bool = True,
        cache: PagedKVCache | None = None,
        drafter: Drafter | None = None,
        depth_policy: DepthPolicy | None = None,
        costly_drafter: CostlyDrafter | None = None,
    ) -> None:
        self.cache = cache or PagedKVCache(
            runner.kv_groups, runner.num_pages, enable_prefix_caching=enable_prefix_caching
        )
        self.max_model_len = min(limits.max_model_len, self.cache.capacity_tokens(runner.kv_groups))
        self._limits = limits
        self._vocab_size = runner.vocab_size
        self._groups = tuple(runner.kv_groups)
        self._eos_token_ids = eos_token_ids
        policy = depth_policy or FixedDepth(0)
        self._scheduler = Scheduler(
            self.cache,
            runner.kv_groups,
            max_num_seqs=limits.max_num_seqs,
            max_model_len=self.max_model_len,
            depth_policy=policy,
        )
        self._budget = StepBudget(limits.max_num_batched_tokens)
        self._decoder = AdaptiveSpeculativeDecoder(runner, drafter or NoDrafter(), policy, self.cache, costly_drafter)
        self._sequences: dict[str, list[Sequence]] = {}
        self._forks: dict[str, list[Sequence]] = {}
        self._arrivals = count()
        self._events: list[TokenEvent] = []
        self._step_time = StepSeconds()
        self.last_output: SpeculativeOutput | None = None

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences of the batch."""
        return tuple(self._scheduler.running)

    @property
    def num_running(self) -> int:
        """Sequences of the batch."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences whose turn has not come."""
        return len(self._scheduler.waiting) + sum(map(len, self._forks.values()))

    @property
    def num_preemptions(self) -> int:
        """How often a sequence had to give its blocks back before its end."""
        return self._scheduler.num_preemptions

    def stats(self) -> EngineStats:
        """The batch and the pool now, and what was counted since the engine began."""
        pool = self.cache.pool
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_blocks_referenced=pool.num_referenced,
            kv_blocks_cached=pool.num_cached,
            kv_blocks_total=pool.num_blocks,
            num_preemptions=self.num_preemptions,
            drafts=self._decoder.ledger.counts(),
            depths=self._decoder.ledger.depths(),
            step_time=self._step_time,
        )

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._events) or self._scheduler.has_work()

    def submit(self, request: Request, hooks: Ordered[ChoiceHooks] = ()) -> None:
        """Take a request; its sequences join at the next step.

        Args:
            request: token ids and options, bounds already checked.
            hooks: one for each choice, or none at all.

        Raises:
            InvalidRequestError: it holds what this model has not, such as ids beyond its vocabulary, or its own id is
                that of a request being served.
            ContextLengthError: the prompt leaves no room for a token.
            QueueFullError: too many sequences wait already.
        """
        check_request(request, self._vocab_size)
        if request.request_id in self._sequences:
            raise InvalidRequestError(f"A request with the id {request.request_id} is already being served.")
        if len(request.prompt_token_ids) >= self.max_model_len:
            raise ContextLengthError(len(request.prompt_token_ids), self.max_model_len)
        free_places = max(0, self._limits.max_num_seqs - self.num_running)  # who fills them waits for no one
        if self.num_waiting >= self._limits.max_queue_len + free_places:
            message = f"The queue is full: {self.num_waiting} sequences are waiting. Try again in a moment."
            raise QueueFullError(message, retry_after_s=_RETRY_AFTER_FULL_QUEUE_S)
        hooks = hooks or [ChoiceHooks()] * request.sampling.n
        eos = frozenset() if request.sampling.ignore_eos else self._eos_token_ids
        first, *others = (
            _new_sequence(request, index, hook, eos, next(self._arrivals)) for index, hook in enumerate(hooks)
        )
        self._sequences[request.request_id] = [first, *others]
        if others:
            self._forks[request.request_id] = others
        self._scheduler.add(first)

    def cancel(self, request_id: str) -> None:
        """End a request, wherever it is; nothing happens if it has ended already."""
        self._end_request(request_id, "abort")

    def join(self, costly: CostlyDrafter) -> None:
        """Let a drafter draft beside the others from the next step on, in place of a costly one that there is."""
        self._decoder.join(costly)

    def check(self, plan: StepPlan | None = None) -> None:
        """Recount the cache's accounts from scratch, given who is being served; slow, for tests and idle moments.

        Another engine's sequences in the same cache are that one's to check.

        Args:
            plan: the step that is about to be computed.

        Raises:
            BrokenInvariantError: naming all that is wrong.
        """
        token_ids: dict[Hashable, list[int]] = {
            s.key: s.token_ids for siblings in self._sequences.values() for s in siblings
        }
        self.cache.check(token_ids, [] if plan is None else plan.writes(), self._groups)

    def step(self) -> list[TokenEvent]:
        """Compute one step; what it, and cancels since the last one, have to tell."""
        try:
            plan = self._scheduler.schedule(self._budget.tokens)
        except PlanningError as broken:
            self._give_up(broken.plan, broken.cause)
        else:
            if plan.scheduled:
                self._run(plan)
        events, self._events = self._events, []
        return events

    def _run(self, plan: StepPlan) -> None:
        now = monotonic()
        for scheduled in plan.scheduled:
            timeline = scheduled.sequence.timeline
            if timeline.first_scheduled is None:
                timeline.first_scheduled, timeline.steps_before = now, self._step_time
        try:
            self.last_output = self._decoder.speculative_decode_step(plan)
        except ConstraintFailedError as failed:
            self._scheduler.undo(plan)
            log.error("constraint_failed", request_id=str(failed), exc_info=failed)
            self._fail(str(failed), failed.cause)
        except Exception as error:  # noqa: BLE001 - told in `_give_up`
            self._give_up(plan, error)
        else:
            self._step_time += self.last_output.timing
            self._commit(self.last_output)
            self._budget.grow()

    def _give_up(self, plan: StepPlan, error: Exception) -> None:
        """A step broke off: plan it anew, smaller, if memory was short; else fail its sequences, and nobody else."""
        if isinstance(error, OutOfMemoryError | MemoryError) and self._budget.shrink(plan.num_tokens):
            log.warning("out_of_memory", next_budget_tokens=self._budget.tokens)
            self._scheduler.undo(plan)
            return
        log.error("step_failed", sequences=len(plan.scheduled), exc_info=error)
        for request_id in {scheduled.sequence.request.request_id for scheduled in plan.scheduled}:
            self._fail(request_id, error)

    def _fail(self, request_id: str, error: Exception) -> None:
        message, kind = explained(error)
        self._end_request(request_id, "error", message, kind)

    def _commit(self, output: SpeculativeOutput) -> None:
        now = monotonic()
        for sequence_output in output.step.outputs:
            sequence = sequence_output.scheduled.sequence
            if sequence.finish_reason is not None:  # another choice of its request has failed, and this one with it
                continue
            request_id = sequence.request.request_id
            try:
                self._commit_one(sequence_output, now)
            except Exception as error:
                # A stop condition that raises is its own request's trouble.
                log.exception("commit_failed", request_id=request_id)
                self._fail(request_id, error)

    def _commit_one(self, output: SequenceOutput, now: float) -> None:
        scheduled = output.scheduled
        sequence = scheduled.sequence
        accepted = output.num_accepted
        sequence.num_computed_tokens = scheduled.start + scheduled.num_tokens + accepted
        sequence.prompt_logprobs += output.prompt_logprobs
        ending = find_ending(sequence, output.token_ids, self.max_model_len)
        # What was right but lies behind a stop is no part of the answer.
        told = min(accepted, len(ending.token_ids))
        if output.token_ids:
            sequence.count_draft(output.draft_source, output.num_draft_tokens, told)
        sequence.append(ending.token_ids, now)
        self._settle(sequence, ending)
        if ending.token_ids or ending.finish_reason:
            self._events.append(step_event(sequence, output, ending, self._step_time))

    def _settle(self, sequence: Sequence, ending: Ending) -> None:
        """Bring the cache's accounts up to date, and let forks or the end of the sequence have their way."""
        # A stop inside a window leaves computed tokens that are not the sequence's.
        sequence.num_computed_tokens = min(sequence.num_computed_tokens, len(sequence.token_ids))
        if self._forks and sequence.index == 0 and sequence.num_computed_tokens >= sequence.num_prompt_tokens:
            # Before the commit, which gives back what the parent's window leaves but a child may still read.
            self._scheduler.fork(sequence, self._forks.pop(sequence.request.request_id, ()))
        self.cache.commit(sequence.key, sequence.token_ids, sequence.num_computed_tokens)
        if ending.finish_reason is not None:
            self._retire(sequence, ending.finish_reason)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._scheduler.drop(sequence)
        sequence.finish_reason = reason
        self._decoder.retire(sequence)

    def _retire(self, sequence: Sequence, reason: FinishReason) -> None:
        self._end(sequence, reason)
        siblings = self._sequences[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request.request_id]

    def _end_request(
        self, request_id: str, reason: FinishReason, message: str | None = None, kind: ErrorKind | None = None
    ) -> None:
        self._forks.pop(request_id, None)
        for sequence in self._sequences.pop(request_id, ()):
            self._end(sequence, reason)
            self._events.append(end_event(sequence, reason, self._step_time, message, kind))


def _new_sequence(
    request: Request, index: int, hooks: ChoiceHooks, eos_token_ids: frozenset[int], arrival_order: int
) -> Sequence:
    return Sequence(
        request=request,
        index=index,
        arrival_order=arrival_order,
        stop_ids=eos_token_ids | frozenset(request.sampling.stop_token_ids),
        stop=hooks.stop,
        constraint=hooks.constraint,
        timeline=Timeline(arrival=monotonic()),
    )
