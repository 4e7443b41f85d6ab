"""What a step will compute and what it got: the types between scheduler and decoder.

A plan never holds the value of a token, only how many of each sequence and where.  That is what planning a step before
the last one's tokens are known needs; counts still come from committed tokens, since nothing is in flight yet.
"""

from dataclasses import dataclass, field

from helix_gateway.core.event import TokenLogprobs
from helix_gateway.core.stats import StepSeconds
from helix_gateway.engine.audit import Write
from helix_gateway.engine.kv_cache import PageCopy
from helix_gateway.engine.sequence import Sequence


@dataclass(slots=True)
class ScheduledSequence:
    """One sequence's part of a step: verified tokens to compute, then draft tokens to verify."""

    sequence: Sequence
    start: int
    """Position of the first token computed."""
    num_tokens: int
    """Verified tokens computed."""
    depth: int
    """Most draft tokens that may follow them; blocks are reserved for as many."""

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, whose logits give a new one."""
        return self.start + self.num_tokens == len(self.sequence.token_ids)


@dataclass(slots=True)
class StepPlan:
    """What each sequence will compute."""

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Most tokens that the step computes, drafts included."""
        return sum(entry.num_tokens + entry.depth for entry in self.scheduled)

    @property
    def num_decodes(self) -> int:
        """Sequences that get a token in this step."""
        return sum(entry.samples for entry in self.scheduled)

    def writes(self) -> list[Write]:
        """The positions that get their KV in this step."""
        return [
            (entry.sequence.key, entry.start, entry.start + entry.num_tokens + entry.depth) for entry in self.scheduled
        ]


@dataclass(slots=True)
class SequenceOutput:
    """What one scheduled sequence got."""

    scheduled: ScheduledSequence
    token_ids: list[int]
    """Accepted drafts, then the recovered or the bonus token; empty where the chunk did not reach the end."""
    num_draft_tokens: int = 0
    draft_source: str | None = None
    """Who proposed them; None where there were none."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def num_accepted(self) -> int:
        """Draft tokens that agreed; the last of ``token_ids`` is none of them."""
        return max(0, len(self.token_ids) - 1)


@dataclass(slots=True)
class StepOutput:
    """What each sequence got, in the plan's order."""

    outputs: list[SequenceOutput]


@dataclass(slots=True)
class SpeculativeOutput:
    """What one speculative step got, and what it took."""

    step: StepOutput
    timing: StepSeconds

    @property
    def accepted_tokens(self) -> list[list[int]]:
        """For each sequence of the plan the tokens it goes on with: accepted drafts, then recovered or bonus."""
        return [output.token_ids for output in self.step.outputs]

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens verified, over all sequences."""
        return sum(output.num_draft_tokens for output in self.step.outputs)

    @property
    def num_accepted_draft_tokens(self) -> int:
        """Of those the ones that agreed."""
        return sum(output.num_accepted for output in self.step.outputs)
