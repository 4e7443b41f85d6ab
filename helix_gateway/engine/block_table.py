"""One sequence's ordered blocks in one KV group.

Position p of the sequence lies in entry ``p // tokens_per_block``.  Entries that a sliding window has left
behind are given back; the table remembers only how many there were.  State, no policy: `PagedKVCache` decides.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from helix_gateway.core.kv import KVGroup
from helix_gateway.core.step import Int32s
from helix_gateway.engine.prefix_index import BlockKey


@dataclass(slots=True)
class SequenceBlockTable:
    """Entries ``num_released`` to ``num_released + len(blocks) - 1`` exist; both change through the methods alone."""

    group: KVGroup
    root: BlockKey
    blocks: list[int] = field(default_factory=list)
    num_released: int = 0
    keys: list[BlockKey] = field(default_factory=list)
    """Chain keys of the leading full blocks, released ones included."""
    _row: Int32s | None = field(default=None, repr=False, compare=False)
    """What `row` answers; None once the entries have changed."""

    @property
    def num_entries(self) -> int:
        """How many blocks' worth of positions the table covers, released ones included."""
        return self.num_released + len(self.blocks)

    @property
    def last_key(self) -> BlockKey:
        """What the next full block's key is chained to."""
        return self.keys[-1] if self.keys else self.root

    def entry(self, position: int) -> int:
        """Which entry holds a position."""
        return position // self.group.tokens_per_block

    def num_missing(self, num_tokens: int) -> int:
        """How many more entries ``num_tokens`` tokens from position 0 on take than exist; below 0 where there are more."""
        return self.entries_for(num_tokens) - self.num_entries

    def entries_for(self, num_tokens: int) -> int:
        """How many entries ``num_tokens`` tokens from position 0 on take."""
        return -(-num_tokens // self.group.tokens_per_block)

    def first_needed(self, num_computed_tokens: int) -> int:
        """The first entry that the token at position ``num_computed_tokens`` still reads."""
        if self.group.window is None:
            return 0
        return max(0, num_computed_tokens - self.group.window + 1) // self.group.tokens_per_block

    def skip(self, num_entries: int) -> None:
        """Let the first so many entries be released ones, of a table that has none yet."""
        self.num_released, self._row = num_entries, None

    def extend(self, blocks: Iterable[int]) -> None:
        """Add entries."""
        self.blocks.extend(blocks)
        self._row = None

    def replace(self, offset: int, block: int) -> None:
        """Put another block where ``blocks[offset]`` was."""
        self.blocks[offset] = block
        self._row = None

    def shorten(self, num_blocks: int) -> list[int]:
        """Keep the first so many of the blocks; those that are the table's no more."""
        gone = self.blocks[num_blocks:]
        del self.blocks[num_blocks:]
        self._row = None
        return gone

    def leave_behind(self, num_blocks: int) -> list[int]:
        """Release the first so many of the blocks; which those were."""
        gone = self.blocks[:num_blocks]
        del self.blocks[:num_blocks]
        self.num_released += num_blocks
        self._row = None
        return gone

    def row(self) -> Int32s:
        """The block numbers, [num_entries], not to be written to; 0 for released entries, which nobody reads.

        The same array for as long as the entries stay the same.
        """
        if self._row is None:
            self._row = np.array([0] * self.num_released + self.blocks, np.int32)
        return self._row
