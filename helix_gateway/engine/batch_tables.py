"""The block tables of a batch, as arrays; kept from step to step, since few tables change at one.

Knows where tables are, and nothing of why they change.
"""

from collections.abc import Hashable, Sequence
from operator import is_

import numpy as np

from helix_gateway.core.step import Int32s
from helix_gateway.engine.kv_cache import PagedKVCache


class BatchTables:
    """The block tables of batches of one model.

    A table's row stays the same object until the table changes, and nobody writes to it: where a batch has the very
    rows of the batch before, it has its arrays.

    Args:
        cache: where the tables are.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache = cache
        self._rows: list[tuple[Int32s, ...]] = []
        """For each group, the rows that the arrays were made of."""
        self._arrays: tuple[Int32s, ...] = ()

    def of(self, keys: Sequence[Hashable]) -> tuple[Int32s, ...]:
        """For each group of the model, [num_seqs, max_blocks], not to be written to; sequences by their keys."""
        rows = _rows_of(keys, self._cache)
        if not (len(rows) == len(self._rows) and all(map(_are_same, rows, self._rows))):
            self._rows, self._arrays = rows, tuple([_stacked(group) for group in rows])
        return self._arrays


def block_tables(keys: Sequence[Hashable], cache: PagedKVCache) -> tuple[Int32s, ...]:
    """As `BatchTables.of`, of a batch that has nothing to do with the one before it."""
    return tuple([_stacked(group) for group in _rows_of(keys, cache)])


def _rows_of(keys: Sequence[Hashable], cache: PagedKVCache) -> list[tuple[Int32s, ...]]:
    """For each group, the row of each sequence."""
    return list(zip(*[[table.row() for table in cache.tables(key)] for key in keys], strict=True))


def _are_same(rows: tuple[Int32s, ...], others: tuple[Int32s, ...]) -> bool:
    return len(rows) == len(others) and all(map(is_, rows, others))


def _stacked(rows: tuple[Int32s, ...]) -> Int32s:
    """The rows below one another, each followed by zeros up to the longest."""
    array = np.zeros((len(rows), max([len(row) for row in rows])), np.int32)
    for out, row in zip(array, rows, strict=True):
        out[: len(row)] = row
    return array
