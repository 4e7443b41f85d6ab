"""Attention on a CPU: one compiled call a layer for the whole ragged batch, reading the pages where they lie.

A step's rows are cut into tiles, and tiles and KV heads (`attention_items.py`) are dealt to threads by cost, once for all
layers.  Who computes an item changes no bit of it.  Knows nothing about models or requests.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.core.step import Float32s, Int32s, StepBatch
from helix_gateway.runtime.cpu.attention_float_items import float_scratch
from helix_gateway.runtime.cpu.attention_int8_items import int8_scratch
from helix_gateway.runtime.cpu.attention_items import attend_item, link_items, write_rows
from helix_gateway.runtime.cpu.attention_shape import (
    GROUP,
    KV_HEADS,
    QUANTISED,
    UNIT,
    WINDOW,
    Plan,
    Plans,
    first_seen,
    join_padded,
    join_plans,
)
from helix_gateway.runtime.cpu.emitter import LANES
from helix_gateway.runtime.cpu.threads import configure_threads
from helix_gateway.runtime.cpu.wide_products import HOST_WIDE
from helix_gateway.runtime.pages import Arena, GroupLayout, Int64s

CPU_KV_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
"""What `CpuPagedAttention` takes."""
ACTIVATIONS = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.uint16)}
"""What queries, new keys and values, and outputs may be, and what tells compiled code so."""
NO_SOFTCAP = float("inf")
"""What a softcap that caps nothing is."""

# Rows (query tokens times heads of a group) of a tile: enough to read a page once for many, few enough to fit caches.
_TILE_ROWS = 24
# Scores of a tile beyond which it gets fewer tokens, so that they stay in the second-level cache (1 MiB).
_TILE_SCORES = 1 << 18
# Tiles a thread from which on they are dealt whole: all KV heads of a page are then read one after another.
_MANY_TILES = 8
# Numbers of new keys and values below which a parallel region costs more than it saves.
_SERIAL_WRITE = 1 << 15
# A window longer than any context.
_UNBOUNDED = 1 << 40


@njit(parallel=True, nogil=True, cache=True)
def _write_layer(kind, stored, shape, offsets, plan, key, value):  # type: ignore[no-untyped-def]
    """Write all rows' keys and values, each thread some rows."""
    threads, rows = len(plan.bounds) - 1, len(plan.positions)
    for thread in prange(threads):
        first, last = rows * thread // threads, rows * (thread + 1) // threads
        write_rows(kind, stored, shape, offsets, plan, first, last, key, value)


@njit(parallel=True, nogil=True, cache=True)
def _attend_layer(  # type: ignore[no-untyped-def]
    kind, stored, shape, offsets, plan, written, query, key, value, scaling, softcap, out, works
):
    """Write the rows from ``written`` on, then attend, each thread its items."""
    write_rows(kind, stored, shape, offsets, plan, written, len(plan.positions), key, value)
    for thread in prange(len(plan.bounds) - 1):
        for item in range(plan.bounds[thread], plan.bounds[thread + 1]):
            attend_item(kind, stored, shape, offsets, plan, item, query, scaling, softcap, out, works[thread])


@njit(cache=True)
def _plan_tiles(  # type: ignore[no-untyped-def]
    shape, cu_seqlens, positions, row_sequence, tile_row, tile_tokens, tile_cost
):
    """Cut every sequence's rows into tiles; returns how many, and the numbers of scratch that the largest needs."""
    group, window, unit = shape[GROUP], shape[WINDOW], shape[UNIT]
    # Floats keep the scores of all heads at once, int8 those of one KV head, beside their weights in half the room.
    columns = 2 * group if shape[QUANTISED] else group * shape[KV_HEADS]
    tiles, most = 0, 0
    for sequence in range(len(cu_seqlens) - 1):
        row, end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
        row_sequence[row:end] = sequence
        while row < end:
            span = min(positions[row] + 1, window) + _TILE_ROWS
            tokens = min(end - row, max(1, min(_TILE_ROWS // group, _TILE_SCORES // (span * columns))))
            first = first_seen(positions[row : row + tokens].min(), window)
            span = positions[row : row + tokens].max() + 1 - first
            tile_row[tiles], tile_tokens[tiles], tile_cost[tiles] = row, tokens, tokens * span + unit
            rows = tokens * group
            most = max(most, int8_scratch(shape, rows, span) if shape[QUANTISED] else float_scratch(shape, rows, span))
            tiles += 1
            row += tokens
    return tiles, (most + LANES - 1) // LANES * LANES


def _deal(costs: Int64s, parts: int, threads: int) -> Int64s:
    """Bounds of the threads' shares of the items (tiles times parts), of about equal cost."""
    ends = np.cumsum(np.repeat(costs, parts))
    marks = ends[-1] * np.arange(1, threads) // threads if len(ends) else np.zeros(threads - 1, np.int64)
    return np.concatenate(([0], np.searchsorted(ends, marks, side="left"), [len(ends)])).astype(np.int64)


def _describe(arena: Arena, layout: GroupLayout, heads: int) -> Int64s:
    """A layer's shape for compiled code, in the order of its field numbers."""
    shape, is_quantised = layout.group.shape, layout.dtype == torch.int8
    if is_quantised and shape.key_dim > HOST_WIDE.most_dims:
        raise ModelLoadError(
            f"Keys of {shape.key_dim} dimensions in int8 are more than this processor's products hold"
            f" ({HOST_WIDE.most_dims}): use --kv-cache-dtype bfloat16."
        )
    window = _UNBOUNDED if shape.window is None else shape.window
    group = heads // shape.kv_heads
    fields = (arena.page_stride, layout.unit_tokens, layout.runs, shape.kv_heads, group)
    return np.array([*fields, shape.key_dim, shape.value_dim, window, is_quantised], np.int64)


class _Layer(NamedTuple):
    """What stays the same for one layer from step to step."""

    plan: int
    """Which of the step's plans is its own."""
    shape: Int64s
    offsets: Int64s
    """[runs], where the layer's units of page 0 begin, in elements."""


class UniformLayers(NamedTuple):
    """What one step's attention needs beside its plan, for layers that are all alike."""

    stored: Any
    """The arena, as numpy has it."""
    shape: Int64s
    offsets: Int64s
    """[num_layers, runs]"""
    works: Float32s


class Layers(NamedTuple):
    """What one step's attention needs beside its plans."""

    stored: Any
    """The arena, as numpy has it."""
    shapes: Int64s
    """[plans, fields of a shape]"""
    offsets: Int64s
    """[num_layers, most runs]"""
    works: Float32s


class CpuPagedAttention:
    """`PagedAttention` over a slice-major arena in float32, bfloat16 or int8.

    Raises:
        ModelLoadError: keys have more dimensions than the processor's sums hold (`wide_products.py`).
    """

    new_arena = staticmethod(Arena.slice_major)

    def __init__(self, arena: Arena, groups: Sequence[GroupLayout], heads: Sequence[int]) -> None:
        """The pages of ``groups``, the model's own among the arena's; ``heads``: query heads of each of its layers."""
        self.dtype = arena.memory.dtype
        """Of keys and values."""
        self._stored = _as_numpy(arena.memory)
        self._planned: list[tuple[int, Int64s]] = []
        """For each plan, its KV group and the shape of its layers."""
        self._layers: dict[int, _Layer] = {}
        for number, layout in enumerate(groups):
            offsets = arena.unit_offsets(layout)
            for place, layer in enumerate(layout.group.layers):
                shape = _describe(arena, layout, heads[layer])
                self._layers[layer] = _Layer(self._plan_number(number, shape), shape, offsets[place].copy())
        self._offsets = np.stack([self._layers[layer].offsets for layer in self._layers]) if self.is_uniform else None
        self._shapes = np.stack([shape for _, shape in self._planned])
        self._all_offsets = join_padded([self._layers[layer].offsets for layer in sorted(self._layers)])
        self.plan_of = [self._layers[layer].plan for layer in sorted(self._layers)]
        """For each layer, which of `all_steps`' plans is its own."""
        self._plans: list[Plan] = []
        self._works: Float32s = np.empty((1, 1), np.float32)
        self.link(torch.float32)
        self._warm_up(groups, heads)

    def _warm_up(self, groups: Sequence[GroupLayout], heads: Sequence[int]) -> None:
        """Compile everything (or load it from the cache) now, not under the first long prompt; writes to page 0."""
        zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
        tables = tuple(np.zeros((1, 1), np.int32) for _ in groups)
        self.begin(StepBatch(zero, zero, np.array([0, 1], np.int32), one, tables, zero[:0]))
        known, shape = self._layers[0], groups[0].group.shape
        query, key, value = (
            torch.zeros(1, count, 1, dim, dtype=torch.float32)
            for count, dim in (
                (heads[0], shape.key_dim),
                (shape.kv_heads, shape.key_dim),
                (shape.kv_heads, shape.value_dim),
            )
        )
        plan, kind = self._plans[known.plan], ACTIVATIONS[torch.float32]
        _write_layer(kind, self._stored, known.shape, known.offsets, plan, _source(key), _source(value))
        self.attend(0, query, key, value, 1.0, None)
        # What torch computes here is small: a team of its own, spinning beside ours, makes a product of 50 µs take 8 ms,
        # and would cut elementwise operators at places that depend on the batch.  Said once compiled code has run: where
        # both use one OpenMP library, numba's start sets the number for torch too.
        torch.set_num_threads(1)

    def link(self, dtype: torch.dtype) -> None:
        """Compile what attends for activations of a dtype; before compiled code that does so for them."""
        link_items(ACTIVATIONS[dtype], self._stored)

    def _plan_number(self, group: int, shape: Int64s) -> int:
        """Layers of one group and one number of query heads share a plan."""
        for number, (other, known) in enumerate(self._planned):
            if other == group and np.array_equal(known, shape):
                return number
        self._planned.append((group, shape))
        return len(self._planned) - 1

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have one shape and one plan."""
        return len(self._planned) == 1

    def step(self) -> tuple[Plan, UniformLayers]:
        """The step that `begin` has prepared, of a model that `is_uniform`."""
        (plan,) = self._plans
        assert self._offsets is not None
        return plan, UniformLayers(self._stored, self._layers[0].shape, self._offsets, self._works)

    def all_steps(self) -> tuple[Plans, Layers]:
        """The step that `begin` has prepared, for layers of any shapes."""
        return join_plans(self._plans), Layers(self._stored, self._shapes, self._all_offsets, self._works)

    def begin(self, batch: StepBatch) -> None:
        """Cut the step's rows into tiles and deal them to the threads."""
        threads = configure_threads()
        self._plans, scratch = [], self._works.shape[1]
        for group, shape in self._planned:
            plan, numbers = _plan_step(batch, batch.block_tables[group], shape, threads)
            self._plans.append(plan)
            scratch = max(scratch, numbers)
        if self._works.shape != (threads, scratch):
            self._works = np.empty((threads, scratch), np.float32)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """See `PagedAttention.attend`."""
        known, wanted = self._layers[layer], query.dtype
        plan = self._plans[known.plan]
        query, key, value = _dense(query), _dense(key), _dense(value)
        kind = ACTIVATIONS[query.dtype]
        self.link(query.dtype)
        out = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
        queries, keys, values = _source(query), _source(key), _source(value)
        written = 0
        if key.numel() + value.numel() >= _SERIAL_WRITE:
            _write_layer(kind, self._stored, known.shape, known.offsets, plan, keys, values)
            written = query.shape[2]
        _attend_layer(
            kind,
            self._stored,
            known.shape,
            known.offsets,
            plan,
            written,
            queries,
            keys,
            values,
            float(scaling),
            NO_SOFTCAP if softcap is None else float(softcap),
            out.data_ptr(),
            self._works,
        )
        return out.to(wanted)


def _as_numpy(memory: torch.Tensor) -> Any:
    """A tensor's memory as compiled code takes it."""
    return memory.view(torch.int16).numpy().view(np.uint16) if memory.dtype == torch.bfloat16 else memory.numpy()


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype of `ACTIVATIONS`, its last dimension consecutive in memory: as it is, nearly always."""
    tensor = tensor if tensor.dtype in ACTIVATIONS else tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _source(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(address, elements between rows, elements between heads) of [1, heads, rows, dim]."""
    return tensor.data_ptr(), tensor.stride(2), tensor.stride(1)


def _plan_step(batch: StepBatch, tables: Int32s, shape: Int64s, threads: int) -> tuple[Plan, int]:
    """The plan of one group's layers, and the numbers of scratch that a thread needs for it."""
    rows = len(batch.positions)
    positions = batch.positions.astype(np.int64)
    row_sequence, tile_row, tile_tokens = (np.empty(rows, np.int32) for _ in range(3))
    costs = np.empty(rows, np.int64)
    tiles, scratch = _plan_tiles(shape, batch.cu_seqlens, positions, row_sequence, tile_row, tile_tokens, costs)
    parts = 1 if tiles >= _MANY_TILES * threads or threads == 1 else int(shape[KV_HEADS])
    bounds = _deal(costs[:tiles], parts, threads)
    tables = np.ascontiguousarray(tables)
    return Plan(positions, row_sequence, tables, tile_row[:tiles], tile_tokens[:tiles], parts, bounds), int(scratch)
