"""What the engine tells about itself now and then: the batch, the pool, and what it has counted since it began.

Knows nothing about who keeps the figures.  Counts only ever grow for as long as the engine lives.
"""

import msgspec


class DraftCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one drafter's work since the engine began."""

    num_drafts: int
    """Windows with at least one draft token; one for each sequence and step."""
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: list[int]
    """How often the draft token at each place, from 0, was accepted."""


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
