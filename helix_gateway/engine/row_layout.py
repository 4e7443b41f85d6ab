"""Where the rows of a step lie in its flat batch, which follows from how many each sequence has and nothing else.

A step mostly has the rows of the step before, one a sequence, so the last few layouts are remembered.  Knows nothing
about sequences.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from helix_gateway.core.step import Int32s

_REMEMBERED = 8
"""Layouts: of a target's steps, and of those now and then that have a prompt's chunk or drafts."""


class RowLayout(NamedTuple):
    """Shared by all steps that are laid out so: nobody writes to the arrays."""

    num_rows: Int32s
    """[num_seqs]"""
    cu_seqlens: Int32s
    """As `StepBatch` has it."""
    sampled_rows: Int32s
    """Flat rows that choose a token, ascending: the last ones of each sequence."""
    are_single: bool
    """Whether each sequence has one row."""


@lru_cache(_REMEMBERED)
def row_layout(num_rows: tuple[int, ...], num_sampled: tuple[int, ...]) -> RowLayout:
    """The layout of sequences with so many rows each, at least one, of which the last so many choose a token."""
    lengths, sampled = np.array(num_rows, np.int32), np.array(num_sampled, np.int32)
    ends = lengths.cumsum(dtype=np.int32)
    return RowLayout(
        num_rows=lengths,
        cu_seqlens=np.concatenate([np.zeros(1, np.int32), ends]),
        sampled_rows=ramps(ends - sampled, sampled),
        are_single=sum(num_rows) == len(num_rows),
    )


def ramps(firsts: Int32s, lengths: Int32s) -> Int32s:
    """``firsts[i], firsts[i] + 1, …``, ``lengths[i]`` numbers each, one after the other; int32."""
    ends = lengths.cumsum(dtype=np.int32)
    count = int(ends[-1]) if ends.size else 0
    numbers: Int32s = np.arange(count, dtype=np.int32) + np.repeat(firsts + lengths - ends, lengths)
    return numbers
