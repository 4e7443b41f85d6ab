"""Who computes what at each step: admission, chunks and depths, room in the cache, and how sequences end.

There is no prefill phase and no decode phase: every running sequence computes what it lacks, as far as the
step's token budget goes.  Knows the cache's accounts but no page, and nothing of tensors.

Memory, when short: cached blocks go first (the pool does that), then depth, then the sequence that ranks last
is preempted and computed again later.  The first in rank is never preempted, so something always finishes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from helix_gateway.engine.block_pool import NoFreeBlocksError
from helix_gateway.engine.depth import DepthPolicy
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.plan import ScheduledSequence, StepPlan
from helix_gateway.engine.sequence import Sequence
from helix_gateway.engine.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step."""

    max_num_seqs: int
    max_num_batched_tokens: int


class Scheduler:
    """Plans steps over the sequences that it was given.

    Args:
        cache: where KV is accounted.
        limits: bounds of a step.
        depth_policy: how many draft tokens a sequence should get.
    """

    def __init__(self, cache: PagedKVCache, limits: SchedulerLimits, depth_policy: DepthPolicy) -> None:
        self._cache = cache
        self._depth_policy = depth_policy
        self.limits = limits
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue()
        self.num_preemptions = 0

    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self.waiting.add(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and give its blocks back."""
        self._cache.remove(sequence.key)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def requeue(self, plan: StepPlan) -> None:
        """Undo a plan that could not be computed: its sequences wait again, to be computed anew."""
        for scheduled in plan.scheduled:
            self._preempt(scheduled.sequence, _StepInMaking(0))

    def schedule(self) -> StepPlan:
        """Plan one step; blocks for all that it could write are reserved."""
        step = _StepInMaking(self.limits.max_num_batched_tokens)
        # Those that lack least come first: a long prompt's chunk must not hold up everybody's next token.
        for sequence in sorted(self.running, key=lambda s: s.num_pending_tokens):
            if sequence in self.running and step.budget:
                self._continue(sequence, step)
        while self.waiting and step.budget and len(self.running) < self.limits.max_num_seqs:
            if not self._admit(self.waiting.head(), step):
                break
        return step.plan()

    def _continue(self, sequence: Sequence, step: "_StepInMaking") -> None:
        """Give a running sequence its part of the step, if need be at the cost of those that rank after it."""
        start = sequence.num_computed_tokens
        # While others wait, nobody's prompt takes more than half of what is left: they join at this very step.
        share = max(1, step.budget // 2) if self.waiting else step.budget
        num_tokens = min(sequence.num_pending_tokens, share)
        reaches_end = num_tokens == sequence.num_pending_tokens
        depth = min(self._depth_policy.depth(sequence), step.budget - num_tokens) if reaches_end else 0
        while True:
            try:
                copies = self._cache.reserve(sequence.key, start, start + num_tokens + depth)
            except NoFreeBlocksError:
                if depth:
                    depth = 0
                elif self._preempt_last(step) is sequence:
                    return
            else:
                step.add(ScheduledSequence(sequence, start, num_tokens, depth), copies)
                return

    def _preempt_last(self, step: "_StepInMaking") -> Sequence:
        victim = self._last_holder()
        self._preempt(victim, step)
        return victim

    def _last_holder(self) -> Sequence:
        holders = [*self.running, *(sequence for sequence in self.waiting if sequence.key in self._cache)]
        return max(holders, key=lambda sequence: sequence.rank)

    def _preempt(self, victim: Sequence, step: "_StepInMaking") -> None:
        self._cache.remove(victim.key)
        victim.num_computed_tokens = 0
        step.withdraw(victim)
        if victim in self.running:
            self.running.remove(victim)
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self.waiting.add(victim)

    def _admit(self, sequence: Sequence, step: "_StepInMaking") -> bool:
        """Start the head of the queue, if all that it is known to need fits (else it would be preempted at once)."""
        if sequence.key not in self._cache:
            self._open(sequence)
        while not self._fits(sequence):
            victim = self._outranked_by(sequence)
            if victim is None:
                return False
            self._preempt(victim, step)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self._continue(sequence, step)
        return True

    def _outranked_by(self, sequence: Sequence) -> Sequence | None:
        """Whose blocks a waiting sequence may have: a waiting one's behind it, or a running one's of lower priority."""
        behind = [other for other in self.waiting if other is not sequence and other.key in self._cache]
        lower = [other for other in self.running if other.request.priority > sequence.request.priority]
        return max(behind or lower, key=lambda other: other.rank, default=None)

    def _open(self, sequence: Sequence) -> None:
        # Positions found in the cache have no logits, so a prompt that is to be scored does without it.
        reuse = not sequence.wants_prompt_logprobs or len(sequence.prompt_logprobs) == sequence.num_prompt_tokens
        salt = sequence.request.cache_salt
        cached = self._cache.add(sequence.key, sequence.token_ids, cache_salt=salt, reuse=reuse)
        sequence.num_computed_tokens = cached
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = cached
            sequence.num_queried_tokens = sequence.num_prompt_tokens if reuse and self._cache.finds_prefixes else 0

    def _fits(self, sequence: Sequence) -> bool:
        needed = self._cache.blocks_needed(sequence.key, sequence.num_computed_tokens, len(sequence.token_ids))
        return needed <= self._cache.pool.num_available

    def fork(self, parent: Sequence, children: Iterable[Sequence]) -> None:
        """Let children, same prompt, share the parent's computed prompt and wait for their turn.

        Each child computes the prompt's last token itself: its logits, with the child's noise, give its first.
        """
        shared = parent.num_prompt_tokens - 1
        for child in children:
            self._cache.fork(parent.key, child.key, shared)
            child.num_computed_tokens = child.num_cached_tokens = shared
            self.waiting.add(child)


class _StepInMaking:
    """A plan while it may still change."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._scheduled: dict[int, ScheduledSequence] = {}
        self._copies: list[tuple[int, int]] = []

    def add(self, scheduled: ScheduledSequence, copies: list[tuple[int, int]]) -> None:
        """Take a sequence's part into the step."""
        self._scheduled[id(scheduled.sequence)] = scheduled
        self._copies += copies
        self.budget -= scheduled.num_tokens + scheduled.depth

    def withdraw(self, sequence: Sequence) -> None:
        """Take it out again, where it is in; its page copies stay, they harm nobody."""
        scheduled = self._scheduled.pop(id(sequence), None)
        if scheduled is not None:
            self.budget += scheduled.num_tokens + scheduled.depth

    def plan(self) -> StepPlan:
        """What stands at the end."""
        return StepPlan(list(self._scheduled.values()), self._copies)
