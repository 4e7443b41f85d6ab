"""What a compiled step must answer like transformers' own modules before it may serve: a few rows at awkward places.

Two steps of a model with one KV group over the first pages of the arena: a chunk across a block's end, a row near the
far end of the context, a window that reads what the chunk wrote, a fresh sequence.  Keys and values that no row wrote
are numbers of no meaning, the same for both.  Knows nothing about how either computes.
"""

from collections.abc import Sequence
from dataclasses import replace

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
# Enough for blocks of one token: six for the chunk and the window, one read again and again, two for the fresh sequence.
_PAGES = 9

_Span = tuple[int, int, Int32s]
"""A sequence's first position, how many rows it has, and its block table."""


def trial_steps(vocab_size: int, group: KVGroup, num_pages: int, context_length: int) -> list[StepBatch]:
    """Batches to be computed in this order; fewer sequences where the arena has few pages."""
    size, far = group.tokens_per_block, min(context_length, _FAR) - 2
    first = max(0, size - _CHUNK // 2)
    second = first + _CHUNK
    if num_pages < _PAGES or far < second + _FEW:
        return [_step(vocab_size, [(0, min(_CHUNK, size, context_length), np.zeros(1, np.int32))])]
    pages = np.arange(_PAGES, dtype=np.int32)
    near, fresh = pages[: -(-(second + _FEW) // size)], pages[-_FEW:]
    # All blocks of the far sequence are one page: what lies there is of no matter, as long as it is read.
    distant = np.full(far // size + 2, len(near), np.int32)
    steps = [
        [(first, _CHUNK, near), (far, 1, distant)],
        [(second, _FEW, near), (far + 1, 1, distant), (0, _FEW, fresh)],
    ]
    return [_step(vocab_size, spans) for spans in steps]


def first_block_step(vocab_size: int, groups: Sequence[KVGroup], num_pages: int) -> StepBatch:
    """The start of one sequence, for models of several KV groups: each has a page of its own, as long as there are some.

    Where there are not, the last page is that of several: a layer reads only what it has just written itself.
    """
    count = min(_CHUNK, *(group.tokens_per_block for group in groups))
    step = _step(vocab_size, [(0, count, np.zeros(1, np.int32))])
    pages = [min(place, num_pages - 1) for place in range(len(groups))]
    return replace(step, block_tables=tuple(np.full((1, 1), page, np.int32) for page in pages))


def fill_pages(arena: Arena) -> None:
    """Numbers like keys' and values', in the pages that the trial reads."""
    count = min(_PAGES, arena.num_pages)
    pages = arena.pages()[:, :count]
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
    tables = np.zeros((len(spans), max(len(table) for *_, table in spans)), np.int32)
    for row, (*_, table) in zip(tables, spans, strict=True):
        row[: len(table)] = table
    return StepBatch(
        token_ids=(np.arange(len(positions), dtype=np.int32) * 7919 + 11) % vocab_size,
        positions=positions,
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        context_lens=np.array([first + count for first, count, _ in spans], np.int32),
        block_tables=(tables,),
        logits_rows=np.arange(len(positions), dtype=np.int32),
    )
