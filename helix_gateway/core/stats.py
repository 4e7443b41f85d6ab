"""What the engine tells about itself now and then: the batch, the pool, and what it has counted since it began.

Knows nothing about who keeps the figures.  Counts only ever grow for as long as the engine lives.
"""

import msgspec


class DraftCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one drafter's work: since the engine began, or for one sequence."""

    num_drafts: int
    """Windows with at least one draft token; one for each sequence and step."""
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: list[int]
    """How often the draft token at each place, from 0, was accepted."""


class StepSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that steps took, by what they did; the plain step is one that verifies no drafts."""

    draft_s: float = 0.0
    """Until it was known what is verified: drafters and the choice of depths."""
    verify_s: float = 0.0
    """The ragged forward, the arrays of its batch and of sampling included."""
    sample_s: float = 0.0
    """Choosing a token for each row, and finding which drafts agree."""

    def __add__(self, other: "StepSeconds") -> "StepSeconds":
        return StepSeconds(
            draft_s=self.draft_s + other.draft_s,
            verify_s=self.verify_s + other.verify_s,
            sample_s=self.sample_s + other.sample_s,
        )

    def __sub__(self, other: "StepSeconds") -> "StepSeconds":
        return StepSeconds(
            draft_s=self.draft_s - other.draft_s,
            verify_s=self.verify_s - other.verify_s,
            sample_s=self.sample_s - other.sample_s,
        )


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One engine's figures at one moment."""

    num_running: int
    """Sequences of the batch."""
    num_waiting: int
    """Sequences whose turn has not come, preempted ones among them."""
    kv_blocks_referenced: int
    kv_blocks_cached: int
    kv_blocks_total: int
    num_preemptions: int
    drafts: dict[str, DraftCounts]
    """By drafter."""
    depths: list[int] = []
    """How many windows verified so many draft tokens, from 0 on; one for each sequence that got a token at a step."""
    step_time: StepSeconds = StepSeconds()
    """Of all steps since the engine began."""
