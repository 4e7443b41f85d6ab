"""What a compiled step must answer like transformers' own modules before it may serve: a few rows at awkward places.

Two steps over the first pages of the arena: a chunk across a block's end, a row near the far end of the context, a window
that reads what the chunk wrote, a fresh sequence.  Keys and values that no row wrote are numbers of no meaning, the same
for both.  Knows nothing about how either computes.
"""

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch

from helix_gateway.core.kv import KVGroup
from helix_gateway.core.step import Int32s, StepBatch
from helix_gateway.runtime.pages import Arena

# Positions beyond which a row would read more than a start should wait for.
_FAR = 4096
_CHUNK = 4
_FEW = 2
# Of the numbers that nobody wrote: beside larger ones a model in bfloat16 no longer agrees with itself in float32.
_SIZE = 0.1
# What bytes of int8 pages are, four together: as a float32 a scale of such keys, as bytes keys like any other.
_SCALES = _SIZE / 127

_Span = tuple[int, int, Sequence[Int32s]]
"""A sequence's first position, how many rows it has, and its block table in each KV group."""


def trial_steps(vocab_size: int, groups: Sequence[KVGroup], num_pages: int, context_length: int) -> list[StepBatch]:
    """Batches to be computed in this order; the start of one sequence where the arena has few pages."""
    sizes = [group.tokens_per_block for group in groups]
    first, far = max(0, max(sizes) - _CHUNK // 2), min(context_length, _FAR) - 2
    second, numbers = first + _CHUNK, count()
    near, distant, fresh = (
        [np.array([next(numbers) for _ in range(-(-tokens // size))], np.int32) for size in sizes]
        for tokens in (second + _FEW, 1, _FEW)
    )
    if num_pages < next(numbers) or far < second + _FEW:
        return [_first_block_step(vocab_size, sizes, num_pages, context_length)]
    # All blocks of the far sequence are one page: what lies there is of no matter, as long as it is read.
    distant = [np.repeat(table, far // size + 2) for table, size in zip(distant, sizes, strict=True)]
    steps = [
        [(first, _CHUNK, near), (far, 1, distant)],
        [(second, _FEW, near), (far + 1, 1, distant), (0, _FEW, fresh)],
    ]
    return [_step(vocab_size, spans) for spans in steps]


def _first_block_step(vocab_size: int, sizes: Sequence[int], num_pages: int, context_length: int) -> StepBatch:
    """The start of one sequence; each group has a page of its own, as long as there are some.

    Where there are not, the last page is that of several: a layer reads only what it has just written itself.
    """
    pages = [np.full(1, min(place, num_pages - 1), np.int32) for place in range(len(sizes))]
    return _step(vocab_size, [(0, min(_CHUNK, context_length, *sizes), pages)])


def fill_pages(arena: Arena, steps: Sequence[StepBatch]) -> None:
    """Numbers like keys' and values', in the pages that a trial reads."""
    last = max(int(table.max()) for step in steps for table in step.block_tables)
    pages = arena.pages()[:, : last + 1]
    if pages.dtype == torch.int8:
        words = pages.view(torch.float32)
        words.copy_(_SCALES * (1.5 + 0.5 * _waves(words)))
    else:
        pages.copy_(_SIZE * _waves(pages))


def _waves(pages: torch.Tensor) -> torch.Tensor:
    """Numbers from -1 to 1, as many as there are in ``pages``."""
    return torch.sin(torch.arange(pages.numel(), dtype=torch.float32)).view(pages.shape)


def _step(vocab_size: int, spans: Sequence[_Span]) -> StepBatch:
    lengths = np.array([count for _, count, _ in spans], np.int32)
    positions = np.concatenate([np.arange(first, first + count, dtype=np.int32) for first, count, _ in spans])
    return StepBatch(
        token_ids=(np.arange(len(positions), dtype=np.int32) * 7919 + 11) % vocab_size,
        positions=positions,
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        context_lens=np.array([first + count for first, count, _ in spans], np.int32),
        block_tables=tuple(_joined(tables) for tables in zip(*(tables for *_, tables in spans), strict=True)),
        logits_rows=np.arange(len(positions), dtype=np.int32),
    )


def _joined(tables: Sequence[Int32s]) -> Int32s:
    """[num_seqs, max_blocks], one group's tables below one another."""
    joined = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, table in zip(joined, tables, strict=True):
        row[: len(table)] = table
    return joined
