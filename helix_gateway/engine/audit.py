"""Recounts what the cache's accounts must agree on, from scratch; each function yields the invariants that are broken.

Follows the tables, which are the truth, and holds everything else against them.  Knows nothing about who is to be told,
nor what is done about it.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

from helix_gateway.core.kv import KVGroup
from helix_gateway.engine.block_pool import BlockPool
from helix_gateway.engine.block_table import SequenceBlockTable
from helix_gateway.engine.prefix_index import BlockKey, PrefixIndex, child_key

Tables = Mapping[Hashable, Sequence[SequenceBlockTable]]
Write = tuple[Hashable, int, int]
"""(sequence, first position, the position after the last) that a step writes."""


class BrokenInvariantError(Exception):
    """The accounts contradict one another: a fault of Helix's own.  The message names every invariant that is broken."""


def account_faults(tables: Tables, pool: BlockPool, index: PrefixIndex) -> Iterator[str]:
    """Whether free + cached + referenced is all, and every count is that of the tables which hold the block."""
    everything = [table for own in tables.values() for table in own]
    yield from pool.faults(block for table in everything for block in table.blocks)
    yield from index.faults()
    if any(len(set(table.blocks)) < len(table.blocks) for table in everything):
        yield "a table holds a block twice"


def token_faults(
    tables: Tables, index: PrefixIndex, token_ids: Mapping[Hashable, Sequence[int]], groups: Sequence[KVGroup]
) -> Iterator[str]:
    """Whether every table of ``groups`` is a living sequence's, and what can be found is what its tokens say."""
    for sequence, own in tables.items():
        if sequence not in token_ids:
            if any(table.group in groups for table in own):
                yield f"blocks are held for {sequence}, which has ended"
            continue
        for table in own:
            chain = _chain(table, token_ids[sequence])
            if table.keys != chain[: len(table.keys)]:
                yield f"the keys of {sequence} in group {table.group.name} are not those of its tokens"
            # Only what it has computed: of a block that it holds since a fork it may read no more than the beginning, and
            # the tokens that it is yet to compute need not be those that its parent put there.
            full = zip(table.blocks, chain[table.num_released : len(table.keys)], strict=False)
            if any(index.holds(block) and index.key_of(block) != key for block, key in full):
                yield f"a block of {sequence} in group {table.group.name} can be found under another content's key"


def _chain(table: SequenceBlockTable, token_ids: Sequence[int]) -> list[BlockKey]:
    """The keys of all full blocks of the tokens, computed anew."""
    size, key, keys = table.group.tokens_per_block, table.root, []
    for start in range(0, len(token_ids) - size + 1, size):
        key = child_key(key, token_ids[start : start + size])
        keys.append(key)
    return keys


def write_faults(tables: Tables, pool: BlockPool, index: PrefixIndex, writes: Iterable[Write]) -> Iterator[str]:
    """Whether every block that is about to be written is there, and is one table's alone."""
    for sequence, start, end in writes:
        for table in tables.get(sequence, ()):
            first, last = table.entry(start), table.entries_for(end)
            if first < table.num_released or last > table.num_entries:
                yield f"{sequence} writes where its table of group {table.group.name} has no block"
                continue
            blocks = table.blocks[first - table.num_released : last - table.num_released]
            if any(pool.ref_count(block) != 1 or index.holds(block) for block in blocks):
                yield f"{sequence} writes to a block of group {table.group.name} that others read or may find"
