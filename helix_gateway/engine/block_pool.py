"""Every page of the arena, and who holds it: one free list, one ledger of reference counts.

A block is free (nobody holds it, nothing worth keeping in it), cached (nobody holds it, but its content can be
found again through the prefix index), or referenced.  Knows nothing about sequences, tokens or what a page
looks like; numbers only.  The idea of paging KV is from Kwon et al. 2023 (PagedAttention, section 4.3).
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

from helix_gateway.engine.prefix_index import PrefixIndex


class NoFreeBlocksError(Exception):
    """The pool cannot give as many blocks as were asked for; nothing was given."""


class BlockPool:
    """The blocks 0 to ``num_blocks - 1``.

    Cached blocks are given away again, least recently released first, once no free block is left.
    """

    def __init__(self, num_blocks: int, prefix_index: PrefixIndex) -> None:
        self.num_blocks = num_blocks
        self._index = prefix_index
        # Both are ordered sets: taking a certain block and taking the oldest are O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._ref_counts = [0] * num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds but that a prefix could still find."""
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        """Blocks that at least one table holds."""
        return self.num_blocks - self.num_available

    def ref_count(self, block: int) -> int:
        """How many tables hold the block."""
        return self._ref_counts[block]

    def is_shared(self, block: int) -> bool:
        """Whether more than one table holds the block, or a prefix could find it: nobody may write to it."""
        return self._ref_counts[block] > 1 or self._index.holds(block)

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Take ``count`` blocks, each with one reference, following ``after`` in the arena where possible.

        Consecutive pages are consecutive memory, and attention reads them a third faster.

        Raises:
            NoFreeBlocksError: fewer are available; nothing was taken.
        """
        if count > self.num_available:
            raise NoFreeBlocksError
        blocks = []
        for _ in range(count):
            after = self._take(after)
            blocks.append(after)
        return blocks

    def _take(self, after: int | None) -> int:
        if after is not None and after + 1 in self._free:
            block = after + 1
            del self._free[block]
        elif self._free:
            block, _ = self._free.popitem(last=False)
        else:
            block, _ = self._cached.popitem(last=False)
            self._index.forget(block)
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a cached or referenced block."""
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each block; those nobody holds any more become cached or free."""
        for block in blocks:
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                home = self._cached if self._index.holds(block) else self._free
                home[block] = None

    def faults(self, holders: Iterable[int]) -> Iterator[str]:
        """What is broken, recounted from ``holders``: every block of every table, one entry a reference."""
        counts = Counter(holders)
        everything = range(self.num_blocks)
        idle = {block for block in everything if not counts[block]}
        if [counts[block] for block in everything] != self._ref_counts or not counts.keys() <= set(everything):
            yield "a block's count is not that of the tables which hold it"
        if idle != self._free.keys() | self._cached.keys():
            yield "free, cached and referenced blocks together are not all blocks"
        if self._free.keys() & self._cached.keys():
            yield "a block is both free and cached"
        if not all(self._index.holds(block) for block in self._cached):
            yield "a cached block cannot be found"
        if any(self._index.holds(block) for block in self._free):
            yield "a free block can be found"
