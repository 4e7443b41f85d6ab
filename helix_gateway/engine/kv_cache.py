"""Which tokens' KV is where: the block pool, every sequence's tables, and the prefix index, as one thing.

Allocation is all or nothing.  A block is written only while one table holds it and nobody could find it; who
must write to another kind of block gets a copy of it (`PageCopy`), which the runner makes before the forward.
Where several models share the pool, each has tables of its own for a sequence, under a key of its own, since what is
computed and what is found again differs from one to the other.  A drafter's tables are *guests* of the sequence that it
drafts for: they may be taken back at any time, and go when their host goes.
Knows nothing about scheduling, nor what a page looks like.  Sequences are named by any hashable key.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm

from helix_gateway.core.kv import KVGroup
from helix_gateway.engine.audit import BrokenInvariantError, Write, account_faults, token_faults, write_faults
from helix_gateway.engine.block_pool import BlockPool, NoFreeBlocksError
from helix_gateway.engine.block_table import SequenceBlockTable
from helix_gateway.engine.prefix_index import PrefixIndex, child_key, root_key

PageCopy = tuple[int, int]
"""(source, destination)"""
_Change = tuple[SequenceBlockTable, int, list[int]]


@dataclass(frozen=True, slots=True)
class _Guest:
    """Tables that somebody can do without."""

    host: Hashable
    token_ids: Sequence[int]
    """What its KV is of, as it was told last."""


class PagedKVCache:
    """All KV there is, for all groups, in one pool of ``num_blocks`` blocks.

    Args:
        groups: the KV groups of every model that shares the pool.
        num_blocks: pages in the arena.
        enable_prefix_caching: whether full blocks can be found again by later sequences.

    Raises:
        ValueError: two groups have the same name.
    """

    def __init__(self, groups: Sequence[KVGroup], num_blocks: int, *, enable_prefix_caching: bool = True) -> None:
        self.groups = tuple(groups)
        if len({group.name for group in self.groups}) < len(self.groups):
            raise ValueError("two KV groups have the same name, so each would find the other's blocks as its own")
        self._index = PrefixIndex()
        self.pool = BlockPool(num_blocks, self._index)
        self.finds_prefixes = enable_prefix_caching
        self._tables: dict[Hashable, tuple[SequenceBlockTable, ...]] = {}
        self._guests: dict[Hashable, _Guest] = {}

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._tables

    def tables(self, sequence: Hashable) -> tuple[SequenceBlockTable, ...]:
        """The sequence's tables, one for each group that it was added with."""
        return self._tables[sequence]

    @property
    def num_available(self) -> int:
        """Blocks that could be had: free ones, cached ones, and those of guests."""
        # A guest's model has groups of its own, so no host holds what a guest does.
        lent = {block for guest in self._guests for table in self._tables[guest] for block in table.blocks}
        return self.pool.num_available + len(lent)

    def capacity_tokens(self, groups: Sequence[KVGroup] | None = None) -> int:
        """Tokens that one sequence could hold if it had the whole pool (windows not counted in its favour).

        One block of each group is set aside for the copy that writing to a shared block takes.

        Args:
            groups: of the model in question; None: all there are.
        """
        groups = groups or self.groups
        usable = self.pool.num_blocks - len(groups)
        low, high = 0, max(0, usable) * max(group.tokens_per_block for group in groups)
        while low < high:
            middle = (low + high + 1) // 2
            needed = sum(-(-middle // group.tokens_per_block) for group in groups)
            low, high = (middle, high) if needed <= usable else (low, middle - 1)
        return low

    # --- life of a sequence

    def add(
        self,
        sequence: Hashable,
        token_ids: Sequence[int],
        *,
        groups: Sequence[KVGroup] | None = None,
        cache_salt: str = "",
        reuse: bool = True,
        host: Hashable | None = None,
    ) -> int:
        """Open the tables of a new sequence and share what is cached of its tokens.

        Args:
            token_ids: all tokens known of it; the last one is always left to compute, for its logits.
            groups: of the model that computes it; None: all there are.
            reuse: whether to look for cached blocks at all.
            host: the sequence whose guest it is, which must be there; None: nobody's.

        Returns:
            How many leading tokens have their KV already.
        """
        roots = [(group, root_key(group.name, cache_salt=cache_salt)) for group in groups or self.groups]
        tables = tuple(SequenceBlockTable(group, root) for group, root in roots)
        self._tables[sequence] = tables
        if host is not None:
            self._guests[sequence] = _Guest(host, token_ids)
        if not (reuse and self.finds_prefixes):
            return 0
        return self._share_prefix(tables, token_ids)

    def _share_prefix(self, tables: tuple[SequenceBlockTable, ...], token_ids: Sequence[int]) -> int:
        found = [_FoundPrefix(table, self._index, token_ids) for table in tables]
        # A prefix can end only where a block of every group ends.
        grain = lcm(*(table.group.tokens_per_block for table in tables))
        hit, last = min(prefix.longest() for prefix in found) // grain * grain, len(token_ids) - 1
        while hit and not all(prefix.covers(hit, min(hit, last)) for prefix in found):
            hit -= grain
        computed = min(hit, last)
        for prefix in found:
            for block in prefix.needed(hit, computed):
                self.pool.share(block)
                prefix.table.extend([block])
            prefix.settle(hit, computed)
        return max(computed, 0)

    def fork(self, parent: Hashable, child: Hashable, num_tokens: int) -> None:
        """Open a child's tables over the parent's blocks for the first ``num_tokens`` tokens; no copy is made yet."""
        forks = tuple(SequenceBlockTable(table.group, table.root) for table in self._tables[parent])
        # Known before anything is shared, so that whatever goes wrong below can be given back.
        self._tables[child] = forks
        for table, fork in zip(self._tables[parent], forks, strict=True):
            fork.skip(table.num_released)
            fork.keys = table.keys[: num_tokens // table.group.tokens_per_block]
            for block in table.blocks[: max(0, table.entries_for(num_tokens) - table.num_released)]:
                self.pool.share(block)
                fork.extend([block])

    def reserve(self, sequence: Hashable, num_computed_tokens: int, num_tokens: int) -> list[PageCopy]:
        """Make positions ``num_computed_tokens`` to ``num_tokens - 1`` writable by this sequence alone.

        Returns:
            Pages to copy before anything is written, in this order.

        Raises:
            NoFreeBlocksError: the pool has too few blocks; nothing was changed.
        """
        parts = self._changes(sequence, num_computed_tokens, num_tokens)
        if not parts:  # as at most steps (docs/log.md)
            return []
        if sum([missing + len(shared) for _, missing, shared in parts]) > self.pool.num_available:
            raise NoFreeBlocksError
        copies: list[PageCopy] = []
        for table, missing, shared in parts:
            copies += self._unshare(table, shared)
            del table.keys[table.entry(num_computed_tokens) :]
            if missing:
                table.extend(self.pool.allocate(missing, after=table.blocks[-1] if table.blocks else None))
        return copies

    def blocks_needed(self, sequence: Hashable, num_computed_tokens: int, num_tokens: int) -> int:
        """How many blocks `reserve` would take from the pool."""
        parts = self._changes(sequence, num_computed_tokens, num_tokens)
        return sum([missing + len(shared) for _, missing, shared in parts])

    def _changes(self, sequence: Hashable, num_computed_tokens: int, num_tokens: int) -> list[_Change]:
        """Tables that `reserve` changes: how many blocks each has too few, and which from there on are not its alone.

        Those too that only lose keys of what is written anew.
        """
        parts = []
        for table in self._tables[sequence]:
            entry = table.entry(num_computed_tokens)
            missing, shared = max(0, table.num_missing(num_tokens)), _shared_entries(self.pool, table, entry)
            if missing or shared or len(table.keys) > entry:
                parts.append((table, missing, shared))
        return parts

    def _unshare(self, table: SequenceBlockTable, shared: Iterable[int]) -> Iterable[PageCopy]:
        for offset in shared:
            source = table.blocks[offset]
            (own,) = self.pool.allocate(1)
            # Released only now: the source must not be the very block just allocated.
            self.pool.release([source])
            table.replace(offset, own)
            yield source, own

    def commit(self, sequence: Hashable, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Take note that the first ``num_computed_tokens`` tokens are verified and have their KV.

        Full blocks can be found from now on; blocks past the last token, and those that a window has left
        behind, are given back.

        Args:
            token_ids: the sequence's tokens, at least ``num_computed_tokens`` of them.
        """
        if sequence in self._guests:
            self._guests[sequence] = _Guest(self._guests[sequence].host, token_ids)
        for table in self._tables[sequence]:
            self._trim(table, num_computed_tokens)
            if self.finds_prefixes:
                self._publish(table, token_ids, num_computed_tokens)
            if table.group.window is not None:
                self._leave_window(table, num_computed_tokens)

    def _trim(self, table: SequenceBlockTable, num_computed_tokens: int) -> None:
        """Roll back: give up entries that hold only rejected tokens."""
        keep = table.entries_for(num_computed_tokens) - table.num_released
        if keep < len(table.blocks):
            self.pool.release(table.shorten(keep))

    def _publish(self, table: SequenceBlockTable, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        size = table.group.tokens_per_block
        num_full = num_computed_tokens // size
        # A draft model's tokens may be cut anew where text goes on, and are then fewer than were published.
        del table.keys[num_full:]
        for entry in range(len(table.keys), num_full):
            table.keys.append(child_key(table.last_key, token_ids[entry * size : (entry + 1) * size]))
            self._index.publish(table.blocks[entry - table.num_released], table.keys[-1])

    def _leave_window(self, table: SequenceBlockTable, num_computed_tokens: int) -> None:
        count = table.first_needed(num_computed_tokens) - table.num_released
        if count > 0:
            self.pool.release(table.leave_behind(count))

    def remove(self, sequence: Hashable) -> None:
        """Give back all that the sequence and its guests hold; nothing happens if it holds nothing."""
        for guest in [name for name, guest in self._guests.items() if guest.host == sequence]:
            self.remove(guest)
        self._guests.pop(sequence, None)
        for table in self._tables.pop(sequence, ()):
            # Last first: a prefix whose beginning was evicted is worthless, so its end should go before it.
            self.pool.release(reversed(table.blocks))

    def evict_guest(self) -> bool:
        """Take back what the guest that came last holds; False if there is no guest."""
        if not self._guests:
            return False
        self.remove(next(reversed(self._guests)))
        return True

    def check(
        self,
        token_ids: Mapping[Hashable, Sequence[int]] | None = None,
        writes: Iterable[Write] = (),
        groups: Sequence[KVGroup] | None = None,
    ) -> None:
        """Recount every invariant from scratch.

        Args:
            token_ids: the tokens of every living sequence, guests aside; None where they are not known, and then
                neither the keys of blocks nor who holds them can be checked.
            writes: what the step that was just planned will write.
            groups: of the model whose sequences those are, where others share the pool; None: all there are.

        Raises:
            BrokenInvariantError: naming all that are broken.
        """
        faults = [*account_faults(self._tables, self.pool, self._index)]
        faults += write_faults(self._tables, self.pool, self._index, writes)
        gone = [name for name, guest in self._guests.items() if guest.host not in self._tables]
        faults += [f"{name} is a guest of {self._guests[name].host}, which has ended" for name in gone]
        if token_ids is not None:
            guests = {name: guest.token_ids for name, guest in self._guests.items()}
            faults += token_faults(self._tables, self._index, {**token_ids, **guests}, groups or self.groups)
        if faults:
            raise BrokenInvariantError("; ".join(faults))

    def reset(self) -> None:
        """Forget everything, cached blocks too; for an engine that serves nobody and whose accounts are wrong."""
        self._index = PrefixIndex()
        self.pool = BlockPool(self.pool.num_blocks, self._index)
        self._tables.clear()
        self._guests.clear()


def _shared_entries(pool: BlockPool, table: SequenceBlockTable, first: int) -> list[int]:
    """Offsets into ``table.blocks`` from the entry ``first`` on that are not this sequence's alone."""
    blocks = table.blocks
    return [offset for offset in range(first - table.num_released, len(blocks)) if pool.is_shared(blocks[offset])]


class _FoundPrefix:
    """What the index knows of one table's leading full blocks."""

    def __init__(self, table: SequenceBlockTable, index: PrefixIndex, token_ids: Sequence[int]) -> None:
        self.table = table
        size = table.group.tokens_per_block
        self._keys = []
        self._blocks: list[int | None] = []
        key = table.root
        for start in range(0, len(token_ids) - size + 1, size):
            key = child_key(key, token_ids[start : start + size])
            self._keys.append(key)
            self._blocks.append(index.find(key))

    def longest(self) -> int:
        """No prefix longer than this many tokens is covered."""
        found = [block is not None for block in self._blocks]
        if self.table.group.window is None:
            count = found.index(False) if False in found else len(found)
        else:
            count = len(found) - found[::-1].index(True) if True in found else 0
        return count * self.table.group.tokens_per_block

    def covers(self, num_tokens: int, num_computed_tokens: int) -> bool:
        """Whether all that the token at ``num_computed_tokens`` reads of the first ``num_tokens`` is there."""
        return None not in self._blocks[self._entries(num_tokens, num_computed_tokens)]

    def needed(self, num_tokens: int, num_computed_tokens: int) -> list[int]:
        """Those blocks."""
        blocks = self._blocks[self._entries(num_tokens, num_computed_tokens)]
        return [block for block in blocks if block is not None]

    def settle(self, num_tokens: int, num_computed_tokens: int) -> None:
        """Let the table, which holds those blocks, know where they stand."""
        self.table.skip(self.table.first_needed(num_computed_tokens) if num_tokens else 0)
        self.table.keys = self._keys[: self.table.entries_for(num_tokens)]

    def _entries(self, num_tokens: int, num_computed_tokens: int) -> slice:
        return slice(self.table.first_needed(num_computed_tokens), self.table.entries_for(num_tokens))
