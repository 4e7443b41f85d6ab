"""One sequence's ordered blocks in one KV group.

Position p of the sequence lies in entry ``p // tokens_per_block``.  Entries that a sliding window has left
behind are given back; the table remembers only how many there were.  State, no policy: `PagedKVCache` decides.
"""

from dataclasses import dataclass, field

from helix_gateway.core.kv import KVGroup
from helix_gateway.core.step import Int32s
from helix_gateway.engine.prefix_index import BlockKey


@dataclass(slots=True)
class SequenceBlockTable:
    """Entries ``num_released`` to ``num_released + len(blocks) - 1`` exist."""

    group: KVGroup
    root: BlockKey
    blocks: list[int] = field(default_factory=list)
    num_released: int = 0
    keys: list[BlockKey] = field(default_factory=list)
    """Chain keys of the leading full blocks, released ones included."""

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

    def fill_row(self, row: Int32s) -> None:
        """Write the block numbers into a zeroed row [max_blocks]; released entries stay 0, nobody reads them."""
        row[self.num_released : self.num_released + len(self.blocks)] = self.blocks
