"""The one thing that engine and runtime both know about paged KV: which groups there are and how many tokens a page holds.

How a page lies in memory is the runtime's affair; which page belongs to whom is the engine's.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers of one model that have the same KV shape and window, and so share one block table a sequence."""

    name: str
    """Unique among the groups of all models that share a pool: what one model stored, another never finds."""
    tokens_per_block: int
    window: int | None
    """A token attends to itself and the ``window - 1`` before it; None: to all before it."""
