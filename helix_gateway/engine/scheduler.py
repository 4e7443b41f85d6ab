"""Who computes what at each step: admission, chunks and depths, room in the cache, and how sequences end.

There is no prefill phase and no decode phase: every running sequence computes what it lacks, as far as the
step's token budget goes, and what is left of it goes to drafts.  Knows the cache's accounts but no page, and nothing of tensors.

Memory, when short: cached blocks go first (the pool does that), then depth, then a drafter's own KV, then the sequence
that ranks last is preempted and computed again later.  The first in rank is never preempted, so something always finishes.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from operator import attrgetter

import structlog

from helix_gateway.core.kv import KVGroup
from helix_gateway.engine.block_pool import NoFreeBlocksError
from helix_gateway.engine.depth import DepthPolicy
from helix_gateway.engine.kv_cache import PageCopy, PagedKVCache
from helix_gateway.engine.plan import ScheduledSequence, StepPlan
from helix_gateway.engine.sequence import Sequence, SequenceKey
from helix_gateway.engine.waiting import WaitingQueue

log = structlog.get_logger(__name__)

_KEPT_TIMES = 2
"""Drafts keep so many times the room from prompts that they lately took: those that prove right grow."""


class PlanningError(Exception):
    """Planning broke off.

    Args:
        plan: what was planned up to there, and, last, the part that was being planned.
        cause: why.
    """

    def __init__(self, plan: StepPlan, cause: Exception) -> None:
        super().__init__(str(cause))
        self.plan = plan
        self.cause = cause


class Scheduler:
    """Plans steps over the sequences that it was given.

    Args:
        cache: where KV is accounted.
        groups: the model's own among the cache's.
        max_num_seqs: most sequences that run at once.
        max_model_len: tokens that a sequence may have, prompt and output together.
        depth_policy: how many draft tokens a sequence should get.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        groups: Ordered[KVGroup],
        *,
        max_num_seqs: int,
        max_model_len: int,
        depth_policy: DepthPolicy,
    ) -> None:
        self._cache = cache
        self._groups = groups
        self._depth_policy = depth_policy
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
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

    def undo(self, plan: StepPlan) -> None:
        """Let the sequences of a step that was not computed go on from where they were; they keep what was reserved.

        Those whose pages were to be copied first wait again, and are computed anew: nobody knows what was copied.
        """
        copied = {destination for _, destination in plan.copies}
        for sequence in [entry.sequence for entry in plan.scheduled if entry.sequence in self.running]:
            if any(block in copied for table in self._cache.tables(sequence.key) for block in table.blocks):
                self._preempt(sequence, _StepInMaking(0))

    def schedule(self, max_tokens: int) -> StepPlan:
        """Plan one step; blocks for all that it could write are reserved.

        Args:
            max_tokens: tokens that the step may compute, drafts included.

        Raises:
            PlanningError: something in it failed; the sequence that was being planned holds no blocks any more.
        """
        wanted = sum([max(_KEPT_TIMES * s.num_lately_drafted, s.lacked_room_for_drafts) for s in self.running])
        most = max(0, max_tokens - len(self.running)) // 2
        step = _StepInMaking(max_tokens, kept_for_drafts=min(most, wanted))
        try:
            self._fill(step)
        except Exception as error:
            raise PlanningError(self._broken_off(step), error) from error
        return step.plan()

    def _fill(self, step: "_StepInMaking") -> None:
        # Those that lack least come first: a long prompt's chunk must not hold up everybody's next token.
        for sequence in sorted(self.running, key=attrgetter("num_pending_tokens")):
            if sequence in self.running:
                step.at = sequence
                self._continue(sequence, step)
        while self.waiting and step.left_for_prompts > 0 and len(self.running) < self._max_num_seqs:
            step.at = self.waiting.head()
            if not self._admit(step.at, step):
                break
        self._deepen(step)

    def _broken_off(self, step: "_StepInMaking") -> StepPlan:
        last = step.at
        if last is None:
            return step.plan()
        pending = last.num_pending_tokens
        self._preempt(last, step)
        plan = step.plan()
        plan.scheduled.append(ScheduledSequence(last, last.num_computed_tokens, min(pending, step.budget), 0))
        return plan

    def _continue(self, sequence: Sequence, step: "_StepInMaking") -> None:
        """Give a running sequence its part of the step, if need be at the cost of those that rank after it."""
        start = sequence.num_computed_tokens
        pending = sequence.num_pending_tokens
        num_tokens = min(pending, self._share(pending, step))
        while num_tokens > 0:
            try:
                copies = self._cache.reserve(sequence.key, start, start + num_tokens)
            except NoFreeBlocksError:
                if not self._cache.evict_guest() and self._preempt_last(step) is sequence:
                    return
            else:
                step.add(ScheduledSequence(sequence, start, num_tokens, 0), copies)
                return

    def _share(self, num_pending: int, step: "_StepInMaking") -> int:
        """Tokens of the step that a sequence may have which lacks so many."""
        if num_pending == 1:
            return min(1, step.budget)
        # While another could join at this very step, nobody's prompt takes more than half of what is left.
        most = -(-step.left_for_prompts // 2) if self._another_may_join() else step.left_for_prompts
        # As many steps as it takes, evenly: a short last one would read all weights for few tokens (docs/log.md).
        return -(-num_pending // -(-num_pending // most)) if most > 0 else most

    def _another_may_join(self) -> bool:
        """Whether there is a place, and room in the cache as far as is known, for who waits longest."""
        if not self.waiting or len(self.running) >= self._max_num_seqs:
            return False
        head = self.waiting.head()
        # Who has no tables yet may find its prompt in the cache: how much room it takes is not known.
        return head.key not in self._cache or self._fits(head) or self._outranked_by(head) is not None

    def _deepen(self, step: "_StepInMaking") -> None:
        """Share what is left of the step among those that may have drafts; nobody gives way for them."""
        ends = [entry for entry in step.scheduled if entry.samples]
        for place, entry in enumerate(ends):
            step.at = entry.sequence
            depth = self._depth(entry.sequence, -(-step.budget // (len(ends) - place)), len(ends))
            if depth:
                try:
                    copies = self._cache.reserve(
                        entry.sequence.key, entry.start, entry.start + entry.num_tokens + depth
                    )
                except NoFreeBlocksError:
                    continue
                step.deepen(entry, depth, copies)

    def _depth(self, sequence: Sequence, room: int, num_decodes: int) -> int:
        """What the policy wishes, as far as there is room, and the request allows."""
        left = self._acceptable(sequence)
        wished = min(left, self._most(sequence, num_decodes)) if left > 0 else 0
        sequence.lacked_room_for_drafts = room == 0 < wished
        if sequence.lacked_room_for_drafts:  # which is nothing against its drafts
            self._depth_policy.excuse(sequence)
        return min(wished, room)

    def _most(self, sequence: Sequence, num_decodes: int) -> int:
        try:
            return self._depth_policy.most(sequence, num_decodes)
        except Exception:  # a depth is no more than a wish: everybody's step is worth more
            log.exception("depth_policy_failed", request_id=sequence.request.request_id)
            return 0

    def _acceptable(self, sequence: Sequence) -> int:
        """Most draft tokens that a sequence could accept before its end, and that its request allows."""
        request = sequence.request
        # The step yields one token more than the drafts it accepts.
        end, max_tokens = self._max_model_len, request.sampling.max_tokens
        if max_tokens is not None:
            end = min(end, sequence.num_prompt_tokens + max_tokens)
        left = end - len(sequence.token_ids) - 1
        return left if request.max_depth is None else min(left, request.max_depth)

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
        salt, groups = sequence.request.cache_salt, self._groups
        cached = self._cache.add(sequence.key, sequence.token_ids, groups=groups, cache_salt=salt, reuse=reuse)
        sequence.num_computed_tokens = cached
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = cached
            sequence.num_queried_tokens = sequence.num_prompt_tokens if reuse and self._cache.finds_prefixes else 0

    def _fits(self, sequence: Sequence) -> bool:
        needed = self._cache.blocks_needed(sequence.key, sequence.num_computed_tokens, len(sequence.token_ids))
        return needed <= self._cache.pool.num_available or needed <= self._cache.num_available

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
    """A plan while it may still change.

    Args:
        budget: tokens that it may have.
        kept_for_drafts: of those, as many as prompts leave alone.
    """

    def __init__(self, budget: int, kept_for_drafts: int = 0) -> None:
        self.budget = budget
        self.kept_for_drafts = kept_for_drafts
        self.at: Sequence | None = None
        """Whose part is being planned."""
        self._parts: dict[SequenceKey, tuple[ScheduledSequence, list[PageCopy]]] = {}

    @property
    def left_for_prompts(self) -> int:
        """Tokens that prompts may still take; less than 0 where those who decode have taken of what was kept."""
        return self.budget - self.kept_for_drafts

    @property
    def scheduled(self) -> list[ScheduledSequence]:
        """The parts so far."""
        return [scheduled for scheduled, _ in self._parts.values()]

    def add(self, scheduled: ScheduledSequence, copies: list[PageCopy]) -> None:
        """Take a sequence's part into the step."""
        self._parts[scheduled.sequence.key] = scheduled, copies
        self.budget -= scheduled.num_tokens + scheduled.depth

    def deepen(self, scheduled: ScheduledSequence, depth: int, copies: list[PageCopy]) -> None:
        """Let a part that is in the step have drafts."""
        scheduled.depth = depth
        self._parts[scheduled.sequence.key][1].extend(copies)
        self.budget -= depth

    def withdraw(self, sequence: Sequence) -> None:
        """Take it out again, where it is in."""
        if sequence.key in self._parts:
            scheduled, _ = self._parts.pop(sequence.key)
            self.budget += scheduled.num_tokens + scheduled.depth

    def plan(self) -> StepPlan:
        """What stands at the end."""
        return StepPlan(self.scheduled, [copy for _, copies in self._parts.values() for copy in copies])
