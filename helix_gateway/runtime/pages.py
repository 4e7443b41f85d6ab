"""How pages lie in memory: the arithmetic of units, and the arena that all KV groups draw pages from.

A page is cut into slices, one for each layer of the target's largest group.  A *unit* holds some consecutive tokens of
one layer; a slice holds a whole number of units of any one group.  A group with fewer layers, or smaller ones, puts
several *runs* of tokens into one page: unit ``run * layers + layer`` lies in slice ``unit // units_per_slice``.  Hence one
page of the one free list serves any group of any model.  How keys and values lie within a unit is the attention's affair,
and which page belongs to whom the engine's.

Elements are numbers of one dtype, or bytes (``torch.int8``) of quantised keys and values with their scales.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.core.kv import KVGroup
from helix_gateway.runtime.groups import LayerGroup
from helix_gateway.runtime.kv_format import token_elements, tokens_apart

Int64s = npt.NDArray[np.int64]

_MARGIN = 64
"""Elements behind the last page: the longest vector."""


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Where one group's tokens lie within a page."""

    group: LayerGroup
    dtype: torch.dtype
    unit_tokens: int
    units_per_slice: int
    runs: int
    """Runs of ``unit_tokens`` consecutive tokens in a page."""

    @property
    def tokens_per_block(self) -> int:
        """Tokens of one sequence that a page of this group holds."""
        return self.unit_tokens * self.runs

    @property
    def unit_elements(self) -> int:
        """Elements of one unit: keys and values of ``unit_tokens`` tokens of one layer."""
        return self.unit_tokens * token_elements(self.group.shape, self.dtype)

    @property
    def kv_group(self) -> KVGroup:
        """What the engine knows of this group."""
        return KVGroup(self.group.name, self.tokens_per_block, self.group.shape.window)


@dataclass(frozen=True, slots=True)
class PageLayout:
    """One page: so many slices of so many elements, and how each group uses them."""

    dtype: torch.dtype
    """Of keys and values."""
    slices: int
    slice_elements: int
    groups: tuple[GroupLayout, ...]
    """Of all models that share the pool."""

    @property
    def page_elements(self) -> int:
        """Elements of one page."""
        return self.slices * self.slice_elements

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, over all slices."""
        return self.page_elements * self.dtype.itemsize

    def groups_of(self, model: str) -> tuple[GroupLayout, ...]:
        """The groups of one model, in its own order."""
        return tuple(layout for layout in self.groups if layout.group.model == model)


def lay_out_pages(groups: Sequence[LayerGroup], block_size: int, dtype: torch.dtype = torch.float32) -> PageLayout:
    """A layout in which a page holds ``block_size`` tokens of the target's largest group, and some of any other.

    Args:
        groups: of all models that share the pool; the first one's model is the target.
        block_size: rounded up to what the dtype asks for: int8 stores tokens in fours.
        dtype: of keys and values.

    Raises:
        ValueError: there is no group, or the block size is not positive.
    """
    if not groups or block_size < 1:
        raise ValueError(f"a page layout needs at least one KV group and a positive block size, not {block_size}")
    target = [group for group in groups if group.model == groups[0].model]
    largest = max(target, key=lambda group: len(group.layers) * token_elements(group.shape, dtype))
    slices, step = len(largest.layers), tokens_apart(dtype)
    block_size = -(-block_size // step) * step
    slice_elements = max(
        block_size * token_elements(largest.shape, dtype),
        *(step * token_elements(group.shape, dtype) * -(-len(group.layers) // slices) for group in groups),
    )
    return PageLayout(
        dtype,
        slices,
        slice_elements,
        tuple(_lay_out_group(group, dtype, slices, slice_elements, block_size) for group in groups),
    )


def _lay_out_group(
    group: LayerGroup, dtype: torch.dtype, slices: int, slice_elements: int, block_size: int
) -> GroupLayout:
    """The unit size that puts most tokens into a page; the longest such unit, since long units are read fastest."""
    step = tokens_apart(dtype)

    def with_unit(unit_tokens: int) -> GroupLayout:
        units_per_slice = slice_elements // (unit_tokens * token_elements(group.shape, dtype))
        return GroupLayout(group, dtype, unit_tokens, units_per_slice, slices * units_per_slice // len(group.layers))

    return max(
        map(with_unit, range(step, block_size + 1, step)),
        key=lambda layout: (layout.tokens_per_block, layout.unit_tokens),
    )


def _in_mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.3g} MiB"


def pages_in(layout: PageLayout, memory_bytes: int | None, max_tokens: int | None) -> int:
    """How many pages to take: what the memory holds, but no more than ``max_tokens`` need in every group.

    Raises:
        ValueError: no memory is given.
        OutOfMemoryError: not one page fits.
    """
    if memory_bytes is None:
        raise ValueError("an arena needs a number of pages, or its memory in bytes")
    page_bytes = layout.page_bytes
    if memory_bytes < page_bytes:
        block_tokens = min(group.tokens_per_block for group in layout.groups)
        raise OutOfMemoryError(
            f"{_in_mib(memory_bytes)} were given, but one block of {block_tokens} tokens takes "
            f"{_in_mib(page_bytes)}"
        )
    pages = memory_bytes // page_bytes
    if max_tokens is None:
        return pages
    return min(pages, sum(-(-max_tokens // group.tokens_per_block) for group in layout.groups))


class Arena:
    """The memory of all pages, one tensor of one dtype.

    Slice-major: a slice of all pages is consecutive memory, so that consecutive pages of a layer are; what suits a CPU.
    Page-major: a page is consecutive memory, and so are its units; what suits devices that gather pages.
    """

    def __init__(self, layout: PageLayout, memory: torch.Tensor, slice_stride: int | None) -> None:
        """See `slice_major` and `page_major`, which make one."""
        self.layout = layout
        self.memory = memory
        """[num_pages * page_elements]"""
        self._slice_stride = slice_stride
        """Elements from one slice to the next; None where units follow one another, whatever the slices."""

    @classmethod
    def slice_major(cls, layout: PageLayout, num_pages: int, device: torch.device) -> "Arena":
        """Memory that is taken from the system only as pages are first written; a vector may be read across its end."""
        elements = num_pages * layout.page_elements
        memory = torch.empty(elements + _MARGIN, dtype=layout.dtype, device=device)
        return cls(layout, memory[:elements], num_pages * layout.slice_elements)

    @classmethod
    def page_major(cls, layout: PageLayout, num_pages: int, device: torch.device) -> "Arena":
        """Memory on any device, zeroed: what was never written must not be NaN, since masked scores read it."""
        return cls(layout, torch.zeros(num_pages * layout.page_elements, dtype=layout.dtype, device=device), None)

    @property
    def num_pages(self) -> int:
        """How many pages there are."""
        return self.memory.numel() // self.layout.page_elements

    @property
    def page_stride(self) -> int:
        """Elements from a unit of one page to the same unit of the next."""
        return self.layout.page_elements if self._slice_stride is None else self.layout.slice_elements

    def pages(self) -> torch.Tensor:
        """[stretches of consecutive elements in a page, num_pages, elements of a stretch], a view of the memory."""
        stretch = self.page_stride
        return self.memory.view(self.layout.page_elements // stretch, self.num_pages, stretch)

    def unit_offsets(self, layout: GroupLayout) -> Int64s:
        """[layers of the group, runs], where each unit of page 0 begins, in elements."""
        layers = len(layout.group.layers)
        numbers = np.arange(layers)[:, None] + layers * np.arange(layout.runs)
        if self._slice_stride is None:
            return numbers * layout.unit_elements
        slices, places = np.divmod(numbers, layout.units_per_slice)
        offsets: Int64s = slices * self._slice_stride + places * layout.unit_elements
        return offsets

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copy whole pages, (source, destination) each, one after another."""
        pages = self.pages()
        for source, destination in copies:
            pages[:, destination].copy_(pages[:, source])
