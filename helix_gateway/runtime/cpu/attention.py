"""Attention on a CPU: one compiled call a layer for the whole ragged batch, reading the pages where they lie.

A *tile* is a few consecutive rows of one sequence, and an *item* a tile and one KV head: all its rows, and all query
heads of the group, share each load of a key or a value.  Items are dealt to threads by cost once a step.  A row's bits
depend on its own sequence alone: a score is one fma chain over the dimensions, the sum of exponentials is taken in 16
parts by absolute position, an output is one fma chain over absolute positions from the window's first to the last.

Within a unit (see `pages.py`) keys lie as [kv_heads, key_dim, unit_tokens], so that lanes are keys, and values as
[kv_heads, unit_tokens, value_dim], so that lanes are dimensions.  Knows nothing about models or requests.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange

from helix_gateway.core.step import Float32s, Int32s, StepBatch
from helix_gateway.runtime.cpu.attention_kernels import (
    LANES,
    WIDE_ROWS,
    add_values,
    dot_keys,
    load_element,
    row_max,
    row_sum,
    store_element,
)
from helix_gateway.runtime.cpu.math import exp_f32
from helix_gateway.runtime.cpu.microkernels import fma
from helix_gateway.runtime.cpu.threads import configure_threads
from helix_gateway.runtime.pages import Arena, GroupLayout, Int64s

CPU_KV_DTYPES = (torch.float32, torch.bfloat16)
"""What `CpuPagedAttention` takes."""

_F32_BYTES = 4
_WIDE = WIDE_ROWS >= 8
# Rows (query tokens times heads of a group) of a tile: enough to read a page once for many, few enough to fit caches.
_TILE_ROWS = 24
# Scores of a tile beyond which it gets fewer tokens, so that they stay in the second-level cache (1 MiB).
_TILE_SCORES = 1 << 18
# Tiles a thread from which on they are dealt whole: all KV heads of a page are then read one after another.
_MANY_TILES = 8
# Numbers of new keys and values below which a parallel region costs more than it saves.
_SERIAL_WRITE = 1 << 15
# Units by which a cache line is asked for before it is read (measured: 16 rows of 512 tokens, 55 to 44 ms on a core).
_AHEAD = 1
# A window longer than any context.
_UNBOUNDED = 1 << 40

# Places in the array that describes a layer's shape to compiled code: one array is unpacked faster than nine integers.
_PAGE_STRIDE, _UNIT, _RUNS, _KV_HEADS, _GROUP, _KEY_DIM, _VALUE_DIM, _WINDOW = range(8)


class Plan(NamedTuple):
    """One step's work for one KV group, the same for all its layers."""

    positions: Int64s
    """[num_tokens]"""
    row_sequence: Int32s
    """[num_tokens], row of ``tables``."""
    tables: Int32s
    """[num_seqs, max_blocks]"""
    tile_row: Int32s
    """[num_tiles], the first row of each tile."""
    tile_tokens: Int32s
    """[num_tiles]"""
    parts: int
    """Items that a tile's KV heads are divided among."""
    bounds: Int64s
    """[threads + 1]; thread t takes the items bounds[t]:bounds[t + 1]."""


@njit(cache=True)
def _unit_at(shape, offsets, table, unit):  # type: ignore[no-untyped-def]
    """Element at which a sequence's unit begins."""
    runs = shape[_RUNS]
    return offsets[unit % runs] + table[unit // runs] * shape[_PAGE_STRIDE]


@njit(cache=True)
def _first_seen(position, window):  # type: ignore[no-untyped-def]
    return max(0, position - window + 1)


@njit(cache=True)
def _write_row(kind, shape, offsets, table, position, row, key, value):  # type: ignore[no-untyped-def]
    """One token's keys and values into its unit; each source is (address, elements between rows, between heads)."""
    unit, size = shape[_UNIT], kind.itemsize
    heads, key_dim, value_dim = shape[_KV_HEADS], shape[_KEY_DIM], shape[_VALUE_DIM]
    start = kind.ctypes.data + _unit_at(shape, offsets, table, position // unit) * size
    slot = position % unit
    for head in range(heads):
        source = key[0] + (row * key[1] + head * key[2]) * size
        target = start + (head * key_dim * unit + slot) * size
        for dim in range(key_dim):
            store_element(kind, target + dim * unit * size, load_element(kind, source + dim * size))
        source = value[0] + (row * value[1] + head * value[2]) * size
        target = start + (heads * key_dim * unit + (head * unit + slot) * value_dim) * size
        for dim in range(value_dim):
            store_element(kind, target + dim * size, load_element(kind, source + dim * size))


@njit(cache=True)
def write_rows(kind, shape, offsets, plan, first, last, key, value):  # type: ignore[no-untyped-def]
    """Keys and values of the rows first:last into their pages; sources as `_write_row` has them."""
    for row in range(first, last):
        table = plan.tables[plan.row_sequence[row]]
        _write_row(kind, shape, offsets, table, plan.positions[row], row, key, value)


@njit(cache=True)
def _take_queries(kind, shape, query, first_row, tokens, heads, work):  # type: ignore[no-untyped-def]
    """Queries of an item as float32, [heads, tokens * group, key_dim] from the start of ``work``."""
    group, depth, size = shape[_GROUP], shape[_KEY_DIM], kind.itemsize
    target = 0
    for head in range(heads[0], heads[1]):
        for row in range(tokens * group):
            source = (first_row + row // group) * query[1] + (head * group + row % group) * query[2]
            for dim in range(depth):
                work[target + dim] = load_element(kind, query[0] + (source + dim) * size)
            target += depth


@njit(cache=True)
def _scores_of_rows(kind, rows, q, q_step, keys, key_step, depth, out, out_step, ahead):  # type: ignore[no-untyped-def]
    """`dot_keys` for any number of rows."""
    row = 0
    while row < rows:
        left = rows - row
        a, b = q + row * q_step, out + row * out_step
        if _WIDE and left >= 8:
            dot_keys(kind, 8, a, q_step, keys, key_step, depth, b, out_step, ahead)
            row += 8
        elif left >= 4:
            dot_keys(kind, 4, a, q_step, keys, key_step, depth, b, out_step, ahead)
            row += 4
        elif left == 3:
            dot_keys(kind, 3, a, q_step, keys, key_step, depth, b, out_step, ahead)
            row += 3
        elif left == 2:
            dot_keys(kind, 2, a, q_step, keys, key_step, depth, b, out_step, ahead)
            row += 2
        else:
            dot_keys(kind, 1, a, q_step, keys, key_step, depth, b, out_step, ahead)
            row += 1


@njit(cache=True)
def _score_singly(kind, shape, rows, keys, first, work, q, out, out_step):  # type: ignore[no-untyped-def]
    """Scores against a unit's last keys, fewer than 16 from ``first`` on: the same chains, one key at a time."""
    unit, depth, size = shape[_UNIT], shape[_KEY_DIM], kind.itemsize
    for row in range(rows):
        for lane in range(first, unit):
            score = np.float32(0.0)
            for dim in range(depth):
                number = load_element(kind, keys + (dim * unit + lane) * size)
                score = fma(number, work[q + row * depth + dim], score)
            work[out + row * out_step + lane] = score


@njit(cache=True)
def _score_unit(kind, shape, rows, keys, ahead, first, last, work, q, out, step):  # type: ignore[no-untyped-def]
    """Scores of one head's queries (at ``q``) against a unit's keys; those at first:last are wanted."""
    unit, depth, size = shape[_UNIT], shape[_KEY_DIM], kind.itemsize
    base, whole = work.ctypes.data, unit // LANES * LANES
    for lane in range(0, whole, LANES):
        if lane < last and lane + LANES > first:
            a, b = base + q * _F32_BYTES, base + (out + lane) * _F32_BYTES
            keys_at, q_step, out_step = keys + lane * size, depth * _F32_BYTES, step * _F32_BYTES
            _scores_of_rows(kind, rows, a, q_step, keys_at, unit * size, depth, b, out_step, ahead)
    if whole < unit:
        _score_singly(kind, shape, rows, keys, whole, work, q, out, step)


@njit(cache=True)
def _score_item(kind, shape, offsets, table, heads, rows, first, last, base, work, scores, step):  # type: ignore[no-untyped-def]
    """Scores [heads, rows, step] of an item's queries against the keys at first:last; column 0 is position ``base``."""
    unit, depth, size = shape[_UNIT], shape[_KEY_DIM], kind.itemsize
    final = (last - 1) // unit
    for number in range(first // unit, final + 1):
        place = _unit_at(shape, offsets, table, number)
        ahead = (_unit_at(shape, offsets, table, min(number + _AHEAD, final)) - place) * size
        start = number * unit
        for head in range(heads[0], heads[1]):
            row = (head - heads[0]) * rows
            keys = kind.ctypes.data + (place + head * depth * unit) * size
            q, out = row * depth, scores + row * step + start - base
            _score_unit(kind, shape, rows, keys, ahead, first - start, last - start, work, q, out, step)


@njit(cache=True)
def _tanh_f32(x):  # type: ignore[no-untyped-def]
    """Hyperbolic tangent: an odd polynomial near 0, where the quotient would cancel (the Cephes library's tanhf)."""
    z = x * x
    p = fma(np.float32(-5.70498872745e-3), z, np.float32(2.06390887954e-2))
    p = fma(fma(p, z, np.float32(-5.37397155531e-2)), z, np.float32(1.33314422036e-1))
    p = fma(fma(p, z, np.float32(-3.33332819422e-1)) * z, x, x)
    size = abs(x)
    far = np.float32(1.0) - np.float32(2.0) / (exp_f32(size + size) + np.float32(1.0))
    far = -far if x < np.float32(0.0) else far
    return p if size < np.float32(0.625) else far


@njit(cache=True)
def _weigh_row(work, row, first, last, scaling, softcap):  # type: ignore[no-untyped-def]
    """Scores at ``row + first : row + last`` to exponentials, zero around them up to multiples of 16; returns the sum."""
    begin, end = first // LANES * LANES, (last + LANES - 1) // LANES * LANES
    for i in range(row + first, row + last):
        work[i] *= scaling
    if softcap > np.float32(0.0):
        for i in range(row + first, row + last):
            work[i] = softcap * _tanh_f32(work[i] / softcap)
    work[row + begin : row + first] = -np.inf
    work[row + last : row + end] = -np.inf
    address, blocks = work.ctypes.data + (row + begin) * _F32_BYTES, (end - begin) // LANES
    top = row_max(address, blocks)
    for i in range(row + begin, row + end):
        work[i] = exp_f32(work[i] - top)
    return row_sum(address, blocks)


@njit(cache=True)
def _add_rest(kind, rows, p, p_step, values, value_step, count, sums, sum_step, done, dims, work):  # type: ignore[no-untyped-def]
    """The dimensions that do not fill a vector of 16: the same chains, one at a time."""
    size = kind.itemsize
    for row in range(rows):
        for dim in range(done, dims):
            total = work[sums + row * sum_step + dim]
            for i in range(count):
                total = fma(load_element(kind, values + i * value_step + dim * size), work[p + row * p_step + i], total)
            work[sums + row * sum_step + dim] = total


@njit(cache=True)
def _add_span(kind, dims, rows, p, p_step, values, count, sums, work, ahead):  # type: ignore[no-untyped-def]
    """Add ``count`` consecutive values of a unit, weighted, to the sums of ``rows`` rows."""
    step, vectors, base = dims * kind.itemsize, dims // LANES, work.ctypes.data
    wide_p, wide_sum = p_step * _F32_BYTES, dims * _F32_BYTES
    row = 0
    while row < rows and vectors > 0:
        left = rows - row
        a, b = base + (p + row * p_step) * _F32_BYTES, base + (sums + row * dims) * _F32_BYTES
        if _WIDE and left >= 8:
            add_values(kind, 8, a, wide_p, values, step, count, b, wide_sum, vectors, ahead)
            row += 8
        elif left >= 4:
            add_values(kind, 4, a, wide_p, values, step, count, b, wide_sum, vectors, ahead)
            row += 4
        elif left == 3:
            add_values(kind, 3, a, wide_p, values, step, count, b, wide_sum, vectors, ahead)
            row += 3
        elif left == 2:
            add_values(kind, 2, a, wide_p, values, step, count, b, wide_sum, vectors, ahead)
            row += 2
        else:
            add_values(kind, 1, a, wide_p, values, step, count, b, wide_sum, vectors, ahead)
            row += 1
    if vectors * LANES < dims:
        _add_rest(kind, rows, p, p_step, values, step, count, sums, dims, vectors * LANES, dims, work)


@njit(cache=True)
def _add_edge(kind, shape, positions, values, first, last, base, work, p, step, sums):  # type: ignore[no-untyped-def]
    """Values at first:last that only some of a tile's tokens see; ``values`` is the place of position 0's."""
    group, dims = shape[_GROUP], shape[_VALUE_DIM]
    for token in range(len(positions)):
        start = max(first, _first_seen(positions[token], shape[_WINDOW]))
        stop = min(last, positions[token] + 1)
        if start < stop:
            row = token * group
            at = values + start * dims * kind.itemsize
            _add_span(
                kind, dims, group, p + row * step + start - base, step, at, stop - start, sums + row * dims, work, 0
            )


@njit(cache=True)
def _add_unit(kind, shape, positions, values, ahead, first, last, base, work, p, step, sums):  # type: ignore[no-untyped-def]
    """One head's values at first:last of one unit; each row takes exactly the positions that it sees, in order."""
    dims = shape[_VALUE_DIM]
    size, rows = dims * kind.itemsize, len(positions) * shape[_GROUP]
    all_from = max(first, min(last, _first_seen(positions.max(), shape[_WINDOW])))
    all_to = max(all_from, min(last, positions.min() + 1))
    if first < all_from:
        _add_edge(kind, shape, positions, values, first, all_from, base, work, p, step, sums)
    if all_from < all_to:
        at = values + all_from * size
        _add_span(kind, dims, rows, p + all_from - base, step, at, all_to - all_from, sums, work, ahead)
    if all_to < last:
        _add_edge(kind, shape, positions, values, all_to, last, base, work, p, step, sums)


@njit(cache=True)
def _add_item(kind, shape, offsets, table, heads, positions, first, last, base, work, p, step, sums):  # type: ignore[no-untyped-def]
    """Weighted values at first:last into the item's sums [heads, rows, value_dim]."""
    unit, dims, size = shape[_UNIT], shape[_VALUE_DIM], kind.itemsize
    rows, keys, final = len(positions) * shape[_GROUP], shape[_KV_HEADS] * shape[_KEY_DIM] * unit, (last - 1) // unit
    for number in range(first // unit, final + 1):
        place = _unit_at(shape, offsets, table, number)
        ahead = (_unit_at(shape, offsets, table, min(number + _AHEAD, final)) - place) * size
        a, b = max(number * unit, first), min(number * unit + unit, last)
        for head in range(heads[0], heads[1]):
            row = (head - heads[0]) * rows
            values = kind.ctypes.data + (place + keys + (head - number) * unit * dims) * size
            at, into = p + row * step, sums + row * dims
            _add_unit(kind, shape, positions, values, ahead, a, b, base, work, at, step, into)


@njit(cache=True)
def _give_outputs(kind, shape, heads, first_row, rows, work, sums, totals, out):  # type: ignore[no-untyped-def]
    """Quotients of an item's sums and totals into ``out`` [num_tokens, query heads, value_dim]."""
    group, dims = shape[_GROUP], shape[_VALUE_DIM]
    for head in range(heads[0], heads[1]):
        for row in range(rows):
            token, member = first_row + row // group, head * group + row % group
            place = (token * shape[_KV_HEADS] * group + member) * dims
            for dim in range(dims):
                store_element(kind, out + (place + dim) * kind.itemsize, work[sums + dim] / work[totals])
            sums += dims
            totals += 1


@njit(cache=True)
def attend_item(kind, shape, offsets, plan, item, query, scaling, softcap, out, work):  # type: ignore[no-untyped-def]
    """One tile and some of its KV heads."""
    tile, part = item // plan.parts, item % plan.parts
    heads = (shape[_KV_HEADS] * part // plan.parts, shape[_KV_HEADS] * (part + 1) // plan.parts)
    row, tokens = plan.tile_row[tile], plan.tile_tokens[tile]
    table, positions = plan.tables[plan.row_sequence[row]], plan.positions[row : row + tokens]
    group, unit = shape[_GROUP], shape[_UNIT]
    first, last = _first_seen(positions.min(), shape[_WINDOW]), positions.max() + 1
    base = first // unit * unit // LANES * LANES
    rows, step = tokens * group, (last - base + unit + LANES) // LANES * LANES + LANES
    all_rows = rows * (heads[1] - heads[0])
    sums = all_rows * shape[_KEY_DIM]
    scores = sums + all_rows * shape[_VALUE_DIM]
    totals = scores + all_rows * step
    _take_queries(kind, shape, query, row, tokens, heads, work)
    work[sums:scores] = np.float32(0.0)
    _score_item(kind, shape, offsets, table, heads, rows, first, last, base, work, scores, step)
    for i in range(all_rows):
        position = positions[i % rows // group]
        seen, at = _first_seen(position, shape[_WINDOW]), scores + i * step
        work[totals + i] = _weigh_row(work, at, seen - base, position + 1 - base, scaling, softcap)
    _add_item(kind, shape, offsets, table, heads, positions, first, last, base, work, scores, step, sums)
    _give_outputs(kind, shape, heads, row, rows, work, sums, totals, out)


@njit(parallel=True, nogil=True, cache=True)
def _write_layer(kind, shape, offsets, plan, key, value):  # type: ignore[no-untyped-def]
    """Write all rows' keys and values, each thread some rows."""
    threads, rows = len(plan.bounds) - 1, len(plan.positions)
    for thread in prange(threads):
        write_rows(kind, shape, offsets, plan, rows * thread // threads, rows * (thread + 1) // threads, key, value)


@njit(parallel=True, nogil=True, cache=True)
def _attend_layer(kind, shape, offsets, plan, written, query, key, value, scaling, softcap, out, works):  # type: ignore[no-untyped-def]
    """Write the rows from ``written`` on, then attend, each thread its items."""
    write_rows(kind, shape, offsets, plan, written, len(plan.positions), key, value)
    for thread in prange(len(plan.bounds) - 1):
        for item in range(plan.bounds[thread], plan.bounds[thread + 1]):
            attend_item(kind, shape, offsets, plan, item, query, scaling, softcap, out, works[thread])


@njit(cache=True)
def _plan_tiles(shape, cu_seqlens, positions, row_sequence, tile_row, tile_tokens, tile_cost):  # type: ignore[no-untyped-def]
    """Cut every sequence's rows into tiles; returns how many, and the numbers of scratch that the largest needs."""
    group, window, unit = shape[_GROUP], shape[_WINDOW], shape[_UNIT]
    heads = group * shape[_KV_HEADS]
    tiles, most = 0, 0
    for sequence in range(len(cu_seqlens) - 1):
        row, end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
        row_sequence[row:end] = sequence
        while row < end:
            span = min(positions[row] + 1, window) + _TILE_ROWS
            tokens = min(end - row, max(1, min(_TILE_ROWS // group, _TILE_SCORES // (span * heads))))
            first = _first_seen(positions[row : row + tokens].min(), window)
            span = positions[row : row + tokens].max() + 1 - first
            tile_row[tiles], tile_tokens[tiles], tile_cost[tiles] = row, tokens, tokens * span + unit
            columns = span + 2 * unit + 4 * LANES
            most = max(most, tokens * heads * (shape[_KEY_DIM] + shape[_VALUE_DIM] + columns + 1))
            tiles += 1
            row += tokens
    return tiles, most


def _deal(costs: Int64s, parts: int, threads: int) -> Int64s:
    """Bounds of the threads' shares of the items (tiles times parts), of about equal cost."""
    ends = np.cumsum(np.repeat(costs, parts))
    marks = ends[-1] * np.arange(1, threads) // threads if len(ends) else np.zeros(threads - 1, np.int64)
    return np.concatenate(([0], np.searchsorted(ends, marks, side="left"), [len(ends)])).astype(np.int64)


def _describe(arena: Arena, layout: GroupLayout, heads: int) -> Int64s:
    """A layer's shape for compiled code, in the order of its field numbers."""
    shape = layout.group.shape
    window = _UNBOUNDED if shape.window is None else shape.window
    group = heads // shape.kv_heads
    fields = (arena.page_stride, layout.unit_tokens, layout.runs, shape.kv_heads, group)
    return np.array([*fields, shape.key_dim, shape.value_dim, window], np.int64)


class _Layer(NamedTuple):
    """What stays the same for one layer from step to step."""

    plan: int
    """Which of the step's plans is its own."""
    shape: Int64s
    offsets: Int64s
    """[runs], where the layer's units of page 0 begin, in elements."""


class UniformStep(NamedTuple):
    """What one step's attention is for layers that are all alike, for whoever computes them in one call."""

    kind: Any
    """The arena, as numpy has it."""
    plan: Plan
    shape: Int64s
    offsets: Int64s
    """[num_layers, runs]"""
    works: Float32s


class CpuPagedAttention:
    """`PagedAttention` over a slice-major arena in float32 or bfloat16."""

    new_arena = staticmethod(Arena.slice_major)

    def __init__(self, arena: Arena, groups: Sequence[GroupLayout], heads: Sequence[int]) -> None:
        """The pages of ``groups``, the model's own among the arena's; ``heads``: query heads of each of its layers."""
        memory = arena.memory
        self.dtype = memory.dtype
        """Of keys and values."""
        self._arena = memory if memory.dtype == torch.float32 else memory.view(torch.int16)
        self._kind = self._arena.numpy() if memory.dtype == torch.float32 else self._arena.numpy().view(np.uint16)
        self._planned: list[tuple[int, Int64s]] = []
        """For each plan, its KV group and the shape of its layers."""
        self._layers: dict[int, _Layer] = {}
        for number, layout in enumerate(groups):
            offsets = arena.unit_offsets(layout)
            for place, layer in enumerate(layout.group.layers):
                shape = _describe(arena, layout, heads[layer])
                self._layers[layer] = _Layer(self._plan_number(number, shape), shape, offsets[place].copy())
        self._offsets = np.stack([self._layers[layer].offsets for layer in self._layers]) if self.is_uniform else None
        self._plans: list[Plan] = []
        self._works: Float32s = np.empty((1, 1), np.float32)
        self._warm_up(groups, heads)

    def _warm_up(self, groups: Sequence[GroupLayout], heads: Sequence[int]) -> None:
        """Compile everything (or load it from the cache) now, not under the first long prompt; writes to page 0."""
        zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
        tables = tuple(np.zeros((1, 1), np.int32) for _ in groups)
        self.begin(StepBatch(zero, zero, np.array([0, 1], np.int32), one, tables, zero[:0]))
        known, shape = self._layers[0], groups[0].group.shape
        query, key, value = (
            torch.zeros(1, count, 1, dim, dtype=self.dtype)
            for count, dim in (
                (heads[0], shape.key_dim),
                (shape.kv_heads, shape.key_dim),
                (shape.kv_heads, shape.value_dim),
            )
        )
        _write_layer(self._kind, known.shape, known.offsets, self._plans[known.plan], _source(key), _source(value))
        self.attend(0, query, key, value, 1.0, None)
        # What torch computes here is small: a team of its own, spinning beside ours, makes a product of 50 µs take 8 ms,
        # and would cut elementwise operators at places that depend on the batch.  Said once compiled code has run: where
        # both use one OpenMP library, numba's start sets the number for torch too.
        torch.set_num_threads(1)

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

    def step(self) -> UniformStep:
        """The step that `begin` has prepared, of a model that `is_uniform`."""
        (plan,) = self._plans
        assert self._offsets is not None
        return UniformStep(self._kind, plan, self._layers[0].shape, self._offsets, self._works)

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
        query, key, value = self._dense(query), self._dense(key), self._dense(value)
        out = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
        queries, keys, values = _source(query), _source(key), _source(value)
        written = 0
        if key.numel() + value.numel() >= _SERIAL_WRITE:
            _write_layer(self._kind, known.shape, known.offsets, plan, keys, values)
            written = query.shape[2]
        _attend_layer(
            self._kind,
            known.shape,
            known.offsets,
            plan,
            written,
            queries,
            keys,
            values,
            float(scaling),
            float(softcap or 0.0),
            out.data_ptr(),
            self._works,
        )
        return out.to(wanted)

    def _dense(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the arena's dtype, its last dimension consecutive in memory: as it is, nearly always."""
        tensor = tensor.to(self.dtype)
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
    parts = 1 if tiles >= _MANY_TILES * threads or threads == 1 else int(shape[_KV_HEADS])
    bounds = _deal(costs[:tiles], parts, threads)
    tables = np.ascontiguousarray(tables)
    return Plan(positions, row_sequence, tables, tile_row[:tiles], tile_tokens[:tiles], parts, bounds), int(scratch)
