"""One speculative step over a whole batch: draft, one ragged forward, sample every row, keep what agrees.

Drafts are verified by sampling each row of each window exactly as plain decoding would have (the same noise at
the same position), so speculation cannot be seen in the text; at depth 0 the very same calls are the plain step.
Knows nothing about queues and blocks: it computes what the plan says.
"""

from itertools import islice
from time import perf_counter
from typing import Generic, NamedTuple

import numpy as np

from helix_gateway.core.event import TokenLogprobs
from helix_gateway.core.protocols import Logits, ModelRunner
from helix_gateway.core.stats import StepSeconds
from helix_gateway.core.step import Int32s, LogprobRows, SamplingRows
from helix_gateway.engine.batch import Window, build_sampling_rows, build_step_batch, lay_out, with_masks
from helix_gateway.engine.batch_tables import BatchTables
from helix_gateway.engine.depth import DepthPolicy
from helix_gateway.engine.draft_ledger import DraftLedger
from helix_gateway.engine.drafters.base import NOTHING, Drafter, DraftTokens
from helix_gateway.engine.drafters.chain import CostlyDrafter, DraftChain
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.plan import (
    SequenceOutput,
    SpeculativeOutput,
    StepOutput,
    StepPlan,
)
from helix_gateway.engine.sequence import Sequence
from helix_gateway.engine.verification import verify


class _Draft(NamedTuple):
    """One sequence's proposal, and as much of it as is verified."""

    proposed: DraftTokens
    verified: DraftTokens


_NO_DRAFT = _Draft(NOTHING, NOTHING)


class AdaptiveSpeculativeDecoder(Generic[Logits]):
    """Runs planned steps of one target model.

    Args:
        runner: the target.
        drafter: who proposes; what it raises costs drafts, never a request.
        depth_policy: how much of the proposals is verified.
        cache: where the pages of each sequence are known.
        costly_drafter: who proposes where that is expected to be worth its time.
    """

    def __init__(
        self,
        runner: ModelRunner[Logits],
        drafter: Drafter,
        depth_policy: DepthPolicy,
        cache: PagedKVCache,
        costly_drafter: CostlyDrafter | None = None,
    ) -> None:
        self._runner = runner
        self._drafter = DraftChain(drafter, costly_drafter, runner.vocab_size)
        self._depth_policy = depth_policy
        self._tables = BatchTables(cache)
        self.ledger = DraftLedger()

    def speculative_decode_step(self, plan: StepPlan) -> SpeculativeOutput:
        """Compute one plan.

        Raises:
            OutOfMemoryError: the device has no room for the step; it may be planned again, smaller.
            ConstraintFailedError: a sequence's constraint raised; the others' step may be planned again.
        """
        began = perf_counter()
        # Before a drafter takes blocks: the sources are nobody's any more.
        self._runner.copy_pages(plan.copies)
        copied = perf_counter()
        drafts = self._draft(plan)
        windows = lay_out(plan.scheduled, [verified.token_ids.tolist() for _, verified in drafts])
        drafted = perf_counter()
        batch = build_step_batch(windows, self._tables)
        # What is known of sampling already is laid out here: the forward leaves a CPU's caches cold (docs/log.md).
        rows = build_sampling_rows(windows, batch, self._runner.vocab_size)
        logits = self._runner.forward(batch)
        computed = perf_counter()
        outputs = self._choose(windows, logits, batch.logits_rows, rows)
        sampled = perf_counter()
        self._learn(drafts, outputs)
        if all(entry.num_tokens == 1 for entry in plan.scheduled):  # what prompts take says nothing of drafts
            self._depth_policy.observe(len(outputs) + sum(o.num_draft_tokens for o in outputs), sampled - drafted)
            num_asked = sum(entry.depth > 0 for entry in plan.scheduled)
            if num_asked and not self._drafter.num_asked:
                self._depth_policy.observe_drafting(num_asked, drafted - copied + perf_counter() - sampled)
        timing = StepSeconds(draft_s=drafted - began, verify_s=computed - drafted, sample_s=sampled - computed)
        return SpeculativeOutput(StepOutput(outputs), timing)

    def join(self, costly: CostlyDrafter) -> None:
        """Let a drafter propose beside the others from the next step on."""
        self._drafter.join(costly)

    def retire(self, sequence: Sequence) -> None:
        """Let drafter and depth policy forget a sequence, which has ended."""
        self._drafter.retire(sequence)
        self._depth_policy.retire(sequence)

    def _draft(self, plan: StepPlan) -> list["_Draft"]:
        """Each scheduled sequence's proposal; where no depth was planned, nobody is asked."""
        drafts = [_NO_DRAFT] * len(plan.scheduled)
        wanted = [index for index, entry in enumerate(plan.scheduled) if entry.depth]
        if not wanted:
            return drafts
        sequences = [plan.scheduled[index].sequence for index in wanted]
        proposed = self._drafter.propose(sequences, [plan.scheduled[index].depth for index in wanted], plan.num_decodes)
        for sequence, draft in zip(sequences, proposed, strict=True):
            if draft.is_reading:
                self._depth_policy.excuse(sequence)
        given = [place for place, draft in enumerate(proposed) if len(draft.token_ids)]
        depths = self._depth_policy.choose(
            [sequences[place] for place in given], [proposed[place] for place in given], plan.num_decodes
        )
        for place, depth in zip(given, depths, strict=True):
            drafts[wanted[place]] = _Draft(proposed[place], proposed[place].first(depth))
        return drafts

    def _learn(self, drafts: list["_Draft"], outputs: list[SequenceOutput]) -> None:
        """Count what came of drafts, and let the depth policy know of it."""
        for (proposed, verified), output in zip(drafts, outputs, strict=True):
            if not output.token_ids:
                continue
            if proposed is not NOTHING:
                self._learn_of(proposed, output)
            if output.num_draft_tokens:
                output.draft_source = verified.source
            self.ledger.count(output.draft_source, output.num_draft_tokens, output.num_accepted)

    def _learn_of(self, proposed: DraftTokens, output: SequenceOutput) -> None:
        for draft in (proposed, proposed.beside):
            if draft is not None and len(draft.token_ids):
                self._depth_policy.learn(output.scheduled.sequence, draft, np.array(output.token_ids, np.int32))

    def _choose(
        self, windows: list[Window], logits: Logits, logits_rows: Int32s, rows: SamplingRows
    ) -> list[SequenceOutput]:
        sampled = self._sample(windows, logits, rows)
        accepted = verify(sampled, [window.draft_tokens for window in windows])
        outputs = [
            SequenceOutput(window.scheduled, tokens, len(window.draft_tokens))
            for window, tokens in zip(windows, accepted, strict=True)
        ]
        scorer = _Scorer(self._runner, logits, logits_rows)
        for window, output in zip(windows, outputs, strict=True):
            if window.is_scored:
                _score(scorer, window, output)
        return outputs

    def _sample(self, windows: list[Window], logits: Logits, rows: SamplingRows) -> list[list[int]]:
        if not rows.logits_index.size:
            return [[] for _ in windows]
        left = iter(self._runner.sample(logits, with_masks(rows, windows, self._runner.vocab_size)).tolist())
        return [list(islice(left, len(window.sampled_rows))) for window in windows]


def _score(scorer: "_Scorer[Logits]", window: Window, output: SequenceOutput) -> None:
    """Add the log-probabilities that the sequence's request asked for."""
    params = window.sequence.request.sampling
    if params.logprobs is not None and output.token_ids:
        rows = list(window.sampled_rows[: len(output.token_ids)])
        output.logprobs = scorer.score(rows, output.token_ids, params.logprobs)
    prompt_rows = list(window.scored_prompt_rows)
    if prompt_rows and params.prompt_logprobs is not None:
        targets = [window.sequence.token_ids[window.position(row) + 1] for row in prompt_rows]
        output.prompt_logprobs = [*scorer.score(prompt_rows, targets, params.prompt_logprobs)]


class _Scorer(Generic[Logits]):
    """Raw log-probabilities out of one step's logits."""

    def __init__(self, runner: ModelRunner[Logits], logits: Logits, rows: Int32s) -> None:
        self._runner = runner
        self._logits = logits
        self._rows = rows

    def score(self, flat_rows: list[int], token_ids: list[int], top: int) -> list[TokenLogprobs]:
        """One entry for each of ``flat_rows``, about ``token_ids`` and the ``top`` likeliest tokens."""
        index = np.searchsorted(self._rows, flat_rows).astype(np.int32)
        scored = self._runner.logprobs(self._logits, index, np.array(token_ids, np.int32), top)
        return [_entry(scored, i, token) for i, token in enumerate(token_ids)]


def _entry(scored: LogprobRows, i: int, token_id: int) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(scored.logprobs[i]),
        rank=int(scored.ranks[i]),
        top_ids=scored.top_ids[i].tolist(),
        top_logprobs=scored.top_logprobs[i].tolist(),
    )
