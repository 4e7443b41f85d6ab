"""Every page of the arena, and who holds it: one free list, one ledger of reference counts.

A block is free (nobody holds it, nothing worth keeping in it), cached (nobody holds it, but its content can be
found again through the prefix index), or referenced.  Knows nothing about sequences, tokens or what a page
looks like; numbers only.  The idea of paging KV is from Kwon et al. 2023 (PagedAttention, section 4.3).
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile

import numpy as np

from helix_gateway.engine.prefix_index import PrefixIndex

_ROOM = 4
"""Blocks left free behind what is handed out, for its table to grow into. Counted beside 2, 8 and 16 (``docs/log.md``)."""
_SPARE_SHARE = 16
"""While no free run is long enough, up to one block in so many is kept free rather than cached (counted there too)."""
_MAX_SPARE = 512
"""No more than this, so that choosing among them takes a tenth of a millisecond and a large pool loses little."""


class NoFreeBlocksError(Exception):
    """The pool cannot give as many blocks as were asked for; nothing was given."""


class BlockPool:
    """The blocks 0 to ``num_blocks - 1``.

    Blocks are handed out in runs of consecutive ones, with some left free behind them for a table to grow into. Cached
    blocks are given away again, least recently released first, once no free run is left that is long enough; what was
    freed for that and did not make a run stays free, up to a sixteenth of the pool.
    """

    def __init__(self, num_blocks: int, prefix_index: PrefixIndex) -> None:
        self.num_blocks = num_blocks
        self._index = prefix_index
        self._max_spare = min(num_blocks // _SPARE_SHARE, _MAX_SPARE)
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

        Consecutive pages are consecutive memory, and attention of a decode reads them a fifth faster (``docs/log.md``).

        Raises:
            NoFreeBlocksError: fewer are available; nothing was taken.
        """
        if count > self.num_available:
            raise NoFreeBlocksError
        followers = () if after is None else range(after + 1, after + 1 + count)
        blocks = self._take(takewhile(self._free.__contains__, followers))
        return blocks if len(blocks) == count else blocks + self._begin_run(count - len(blocks))

    def _begin_run(self, count: int) -> list[int]:
        """Take the longest runs there are, and of the last of them the end, with some room behind it."""
        while len(self._free) < count:
            self._evict()
        runs = self._longest_runs(count)
        if len(runs[0]) < count + _ROOM and self._free_a_run(count + _ROOM):
            runs = self._longest_runs(count)
        blocks: list[int] = []
        for run in runs:
            missing = count - len(blocks)
            # From the end, since tables are released last block first: what is evicted next joins the beginning.
            first = max(0, len(run) - missing - _ROOM)
            blocks += run[first : first + missing]
            if len(blocks) == count:
                break
        return self._take(blocks)

    def _longest_runs(self, count: int) -> list[range]:
        """The longest runs among enough of those that have been free for longest, as many as could be wanted."""
        num_seen = min(len(self._free), max(count, self._max_spare))
        blocks = np.sort(np.fromiter(islice(self._free, num_seen), np.int64, num_seen))
        last = np.flatnonzero(np.diff(blocks, append=-1) != 1)
        ends, lengths = blocks[last] + 1, np.diff(last, prepend=-1)
        longest = np.argsort(-lengths, kind="stable")[:count]
        return [*map(range, (ends - lengths)[longest].tolist(), ends[longest].tolist())]

    def _free_a_run(self, length: int) -> bool:
        """Evict until there is one, or as much is free as may be; say whether anything was."""
        num_free = len(self._free)
        while self._cached and len(self._free) < self._max_spare:
            if self._run_length(self._evict()) >= length:
                break
        return len(self._free) > num_free

    def _run_length(self, block: int) -> int:
        """How many consecutive free blocks a free one lies among."""
        first = last = block
        while first - 1 in self._free:
            first -= 1
        while last + 1 in self._free:
            last += 1
        return last + 1 - first

    def _evict(self) -> int:
        """Free the block that was released longest ago."""
        block, _ = self._cached.popitem(last=False)
        self._index.forget(block)
        self._free[block] = None
        return block

    def _take(self, blocks: Iterable[int]) -> list[int]:
        taken = [*blocks]
        for block in taken:
            del self._free[block]
            self._ref_counts[block] = 1
        return taken

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
