"""Attention of one item over pages of float32 or bfloat16, and the writing of keys and values into them.

All rows of an item, and all query heads of a group, share each load of a key or a value.  A row's bits depend on its own
sequence alone: a score is one fma chain over the dimensions, the sum of exponentials is taken in 16 parts by absolute
position, an output is one fma chain over absolute positions from the window's first to the last.

``kind`` is an array whose dtype is that of what comes and goes (queries, new keys and values, outputs), ``stored`` the
arena; each is float32, or uint16 for the bits of bfloat16.

Within a unit (see `pages.py`) keys lie as [kv_heads, key_dim, unit_tokens], so that lanes are keys, and values as
[kv_heads, unit_tokens, value_dim], so that lanes are dimensions.  Knows nothing about models, threads or requests.
"""

import numpy as np
from numba import njit

from helix_gateway.core.inner_functions import INNER
from helix_gateway.runtime.cpu.attention_kernels import (
    WIDE_ROWS,
    add_values,
    dot_keys,
    load_element,
    row_max,
    row_sum,
    store_element,
)
from helix_gateway.runtime.cpu.attention_shape import (
    GROUP,
    KEY_DIM,
    KV_HEADS,
    UNIT,
    VALUE_DIM,
    WINDOW,
    first_seen,
    softcapped,
    unit_at,
)
from helix_gateway.runtime.cpu.emitter import F32_BYTES, LANES
from helix_gateway.runtime.cpu.math import exp_f32
from helix_gateway.runtime.cpu.microkernels import fma

_WIDE = WIDE_ROWS >= 8
# Units by which a cache line is asked for before it is read (measured: 16 rows of 512 tokens, 55 to 44 ms on a core).
_AHEAD = 1


@njit(cache=True)
def _write_row(kind, stored, shape, offsets, table, position, row, key, value):  # type: ignore[no-untyped-def]
    """One token's keys and values into its unit; each source is (address, elements between rows, between heads)."""
    unit, given, size = shape[UNIT], kind.itemsize, stored.itemsize
    heads, key_dim, value_dim = shape[KV_HEADS], shape[KEY_DIM], shape[VALUE_DIM]
    start = stored.ctypes.data + unit_at(shape, offsets, table, position // unit) * size
    slot = position % unit
    for head in range(heads):
        source = key[0] + (row * key[1] + head * key[2]) * given
        target = start + (head * key_dim * unit + slot) * size
        for dim in range(key_dim):
            store_element(stored, target + dim * unit * size, load_element(kind, source + dim * given))
        source = value[0] + (row * value[1] + head * value[2]) * given
        target = start + (heads * key_dim * unit + (head * unit + slot) * value_dim) * size
        for dim in range(value_dim):
            store_element(stored, target + dim * size, load_element(kind, source + dim * given))


@njit(cache=True, **INNER)
def write_float_rows(kind, stored, shape, offsets, plan, first, last, key, value):  # type: ignore[no-untyped-def]
    """Keys and values of the rows first:last into their pages; sources as `_write_row` has them."""
    for row in range(first, last):
        table = plan.tables[plan.row_sequence[row]]
        _write_row(kind, stored, shape, offsets, table, plan.positions[row], row, key, value)


@njit(cache=True, **INNER)
def _take_queries(kind, shape, query, first_row, tokens, heads, work):  # type: ignore[no-untyped-def]
    """Queries of an item as float32, [heads, tokens * group, key_dim] from the start of ``work``."""
    group, depth, size = shape[GROUP], shape[KEY_DIM], kind.itemsize
    target = 0
    for head in range(heads[0], heads[1]):
        for row in range(tokens * group):
            source = (first_row + row // group) * query[1] + (head * group + row % group) * query[2]
            for dim in range(depth):
                work[target + dim] = load_element(kind, query[0] + (source + dim) * size)
            target += depth


@njit(cache=True, **INNER)
def _scores_of_rows(stored, rows, q, q_step, keys, key_step, depth, out, out_step, ahead):  # type: ignore[no-untyped-def]
    """`dot_keys` for any number of rows."""
    row = 0
    while row < rows:
        left = rows - row
        a, b = q + row * q_step, out + row * out_step
        if _WIDE and left >= 8:
            dot_keys(stored, 8, a, q_step, keys, key_step, depth, b, out_step, ahead)
            row += 8
        elif left >= 4:
            dot_keys(stored, 4, a, q_step, keys, key_step, depth, b, out_step, ahead)
            row += 4
        elif left == 3:
            dot_keys(stored, 3, a, q_step, keys, key_step, depth, b, out_step, ahead)
            row += 3
        elif left == 2:
            dot_keys(stored, 2, a, q_step, keys, key_step, depth, b, out_step, ahead)
            row += 2
        else:
            dot_keys(stored, 1, a, q_step, keys, key_step, depth, b, out_step, ahead)
            row += 1


@njit(cache=True, **INNER)
def _score_singly(stored, shape, rows, keys, first, work, q, out, out_step):  # type: ignore[no-untyped-def]
    """Scores against a unit's last keys, fewer than 16 from ``first`` on: the same chains, one key at a time."""
    unit, depth, size = shape[UNIT], shape[KEY_DIM], stored.itemsize
    for row in range(rows):
        for lane in range(first, unit):
            score = np.float32(0.0)
            for dim in range(depth):
                number = load_element(stored, keys + (dim * unit + lane) * size)
                score = fma(number, work[q + row * depth + dim], score)
            work[out + row * out_step + lane] = score


@njit(cache=True, **INNER)
def _score_unit(stored, shape, rows, keys, ahead, first, last, work, q, out, step):  # type: ignore[no-untyped-def]
    """Scores of one head's queries (at ``q``) against a unit's keys; those at first:last are wanted."""
    unit, depth, size = shape[UNIT], shape[KEY_DIM], stored.itemsize
    base, whole = work.ctypes.data, unit // LANES * LANES
    for lane in range(0, whole, LANES):
        if lane < last and lane + LANES > first:
            a, b = base + q * F32_BYTES, base + (out + lane) * F32_BYTES
            keys_at, q_step, out_step = keys + lane * size, depth * F32_BYTES, step * F32_BYTES
            _scores_of_rows(stored, rows, a, q_step, keys_at, unit * size, depth, b, out_step, ahead)
    if whole < unit:
        _score_singly(stored, shape, rows, keys, whole, work, q, out, step)


@njit(cache=True, **INNER)
def _score_item(stored, shape, offsets, table, heads, rows, first, last, base, work, scores, step):  # type: ignore[no-untyped-def]
    """Scores [heads, rows, step] of an item's queries against the keys at first:last; column 0 is position ``base``."""
    unit, depth, size = shape[UNIT], shape[KEY_DIM], stored.itemsize
    final = (last - 1) // unit
    for number in range(first // unit, final + 1):
        place = unit_at(shape, offsets, table, number)
        ahead = (unit_at(shape, offsets, table, min(number + _AHEAD, final)) - place) * size
        start = number * unit
        for head in range(heads[0], heads[1]):
            row = (head - heads[0]) * rows
            keys = stored.ctypes.data + (place + head * depth * unit) * size
            q, out = row * depth, scores + row * step + start - base
            _score_unit(stored, shape, rows, keys, ahead, first - start, last - start, work, q, out, step)


@njit(cache=True, **INNER)
def _weigh_row(work, row, first, last, scaling, softcap):  # type: ignore[no-untyped-def]
    """Scores at ``row + first : row + last`` to exponentials, zero around them up to multiples of 16; returns the sum."""
    begin, end = first // LANES * LANES, (last + LANES - 1) // LANES * LANES
    for i in range(row + first, row + last):
        work[i] *= scaling
    if softcap < np.inf:
        for i in range(row + first, row + last):
            work[i] = softcapped(work[i], softcap)
    work[row + begin : row + first] = -np.inf
    work[row + last : row + end] = -np.inf
    address, blocks = work.ctypes.data + (row + begin) * F32_BYTES, (end - begin) // LANES
    top = row_max(address, blocks)
    for i in range(row + begin, row + end):
        work[i] = exp_f32(work[i] - top)
    return row_sum(address, blocks)


@njit(cache=True, **INNER)
def _add_rest(stored, rows, p, p_step, values, value_step, count, sums, sum_step, done, dims, work):  # type: ignore[no-untyped-def]
    """The dimensions that do not fill a vector of 16: the same chains, one at a time."""
    size = stored.itemsize
    for row in range(rows):
        for dim in range(done, dims):
            total = work[sums + row * sum_step + dim]
            for i in range(count):
                total = fma(
                    load_element(stored, values + i * value_step + dim * size), work[p + row * p_step + i], total
                )
            work[sums + row * sum_step + dim] = total


@njit(cache=True, **INNER)
def _add_span(stored, dims, rows, p, p_step, values, count, sums, work, ahead):  # type: ignore[no-untyped-def]
    """Add ``count`` consecutive values of a unit, weighted, to the sums of ``rows`` rows."""
    step, vectors, base = dims * stored.itemsize, dims // LANES, work.ctypes.data
    wide_p, wide_sum = p_step * F32_BYTES, dims * F32_BYTES
    row = 0
    while row < rows and vectors > 0:
        left = rows - row
        a, b = base + (p + row * p_step) * F32_BYTES, base + (sums + row * dims) * F32_BYTES
        if _WIDE and left >= 8:
            add_values(stored, 8, a, wide_p, values, step, count, b, wide_sum, vectors, ahead)
            row += 8
        elif left >= 4:
            add_values(stored, 4, a, wide_p, values, step, count, b, wide_sum, vectors, ahead)
            row += 4
        elif left == 3:
            add_values(stored, 3, a, wide_p, values, step, count, b, wide_sum, vectors, ahead)
            row += 3
        elif left == 2:
            add_values(stored, 2, a, wide_p, values, step, count, b, wide_sum, vectors, ahead)
            row += 2
        else:
            add_values(stored, 1, a, wide_p, values, step, count, b, wide_sum, vectors, ahead)
            row += 1
    if vectors * LANES < dims:
        _add_rest(stored, rows, p, p_step, values, step, count, sums, dims, vectors * LANES, dims, work)


@njit(cache=True, **INNER)
def _add_edge(stored, shape, positions, values, first, last, base, work, p, step, sums):  # type: ignore[no-untyped-def]
    """Values at first:last that only some of a tile's tokens see; ``values`` is the place of position 0's."""
    group, dims = shape[GROUP], shape[VALUE_DIM]
    for token in range(len(positions)):
        start = max(first, first_seen(positions[token], shape[WINDOW]))
        stop = min(last, positions[token] + 1)
        if start < stop:
            row = token * group
            at = values + start * dims * stored.itemsize
            _add_span(
                stored, dims, group, p + row * step + start - base, step, at, stop - start, sums + row * dims, work, 0
            )


@njit(cache=True, **INNER)
def _add_unit(stored, shape, positions, values, ahead, first, last, base, work, p, step, sums):  # type: ignore[no-untyped-def]
    """One head's values at first:last of one unit; each row takes exactly the positions that it sees, in order."""
    dims = shape[VALUE_DIM]
    size, rows = dims * stored.itemsize, len(positions) * shape[GROUP]
    all_from = max(first, min(last, first_seen(positions.max(), shape[WINDOW])))
    all_to = max(all_from, min(last, positions.min() + 1))
    if first < all_from:
        _add_edge(stored, shape, positions, values, first, all_from, base, work, p, step, sums)
    if all_from < all_to:
        at = values + all_from * size
        _add_span(stored, dims, rows, p + all_from - base, step, at, all_to - all_from, sums, work, ahead)
    if all_to < last:
        _add_edge(stored, shape, positions, values, all_to, last, base, work, p, step, sums)


@njit(cache=True, **INNER)
def _add_item(stored, shape, offsets, table, heads, positions, first, last, base, work, p, step, sums):  # type: ignore[no-untyped-def]
    """Weighted values at first:last into the item's sums [heads, rows, value_dim]."""
    unit, dims, size = shape[UNIT], shape[VALUE_DIM], stored.itemsize
    rows, keys, final = len(positions) * shape[GROUP], shape[KV_HEADS] * shape[KEY_DIM] * unit, (last - 1) // unit
    for number in range(first // unit, final + 1):
        place = unit_at(shape, offsets, table, number)
        ahead = (unit_at(shape, offsets, table, min(number + _AHEAD, final)) - place) * size
        a, b = max(number * unit, first), min(number * unit + unit, last)
        for head in range(heads[0], heads[1]):
            row = (head - heads[0]) * rows
            values = stored.ctypes.data + (place + keys + (head - number) * unit * dims) * size
            at, into = p + row * step, sums + row * dims
            _add_unit(stored, shape, positions, values, ahead, a, b, base, work, at, step, into)


@njit(cache=True, **INNER)
def _give_outputs(kind, shape, heads, first_row, rows, work, sums, totals, out):  # type: ignore[no-untyped-def]
    """Quotients of an item's sums and totals into ``out`` [num_tokens, query heads, value_dim]."""
    group, dims = shape[GROUP], shape[VALUE_DIM]
    for head in range(heads[0], heads[1]):
        for row in range(rows):
            token, member = first_row + row // group, head * group + row % group
            place = (token * shape[KV_HEADS] * group + member) * dims
            for dim in range(dims):
                store_element(kind, out + (place + dim) * kind.itemsize, work[sums + dim] / work[totals])
            sums += dims
            totals += 1


@njit(cache=True, **INNER)
def attend_float_item(kind, stored, shape, offsets, plan, item, query, scaling, softcap, out, work):  # type: ignore[no-untyped-def]
    """One tile and some of its KV heads."""
    tile, part = item // plan.parts, item % plan.parts
    heads = (shape[KV_HEADS] * part // plan.parts, shape[KV_HEADS] * (part + 1) // plan.parts)
    row, tokens = plan.tile_row[tile], plan.tile_tokens[tile]
    table, positions = plan.tables[plan.row_sequence[row]], plan.positions[row : row + tokens]
    group, unit = shape[GROUP], shape[UNIT]
    first, last = first_seen(positions.min(), shape[WINDOW]), positions.max() + 1
    base = first // unit * unit // LANES * LANES
    rows, step = tokens * group, (last - base + unit + LANES) // LANES * LANES + LANES
    all_rows = rows * (heads[1] - heads[0])
    sums = all_rows * shape[KEY_DIM]
    scores = sums + all_rows * shape[VALUE_DIM]
    totals = scores + all_rows * step
    _take_queries(kind, shape, query, row, tokens, heads, work)
    work[sums:scores] = np.float32(0.0)
    _score_item(stored, shape, offsets, table, heads, rows, first, last, base, work, scores, step)
    for i in range(all_rows):
        position = positions[i % rows // group]
        seen, at = first_seen(position, shape[WINDOW]), scores + i * step
        work[totals + i] = _weigh_row(work, at, seen - base, position + 1 - base, scaling, softcap)
    _add_item(stored, shape, offsets, table, heads, positions, first, last, base, work, scores, step, sums)
    _give_outputs(kind, shape, heads, row, rows, work, sums, totals, out)


@njit(cache=True, **INNER)
def float_scratch(shape, rows, span):  # type: ignore[no-untyped-def]
    """Numbers of scratch (float32) that an item of ``rows`` rows a head over ``span`` positions needs."""
    columns = span + 2 * shape[UNIT] + 4 * LANES
    return rows * shape[KV_HEADS] * (shape[KEY_DIM] + shape[VALUE_DIM] + columns + 1)
