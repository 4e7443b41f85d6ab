"""Attention of one item over int8 pages, and the writing of quantised keys and values; the siblings of those in
`attention_items.py`, where a tile, an item and a plan are told.

Within a unit each KV head has, one after another: keys [key_dim / 4, unit_tokens, 4], so that lanes are tokens; values
[unit_tokens / 4, value_dim, 4], so that lanes are dimensions; the keys' scales and the values' scales, float32
[unit_tokens] each.  A byte is the quantised number plus 128.

Queries are quantised to 16 bits for each row and head, kept in two planes (`wide_products.py`).  So are attention
weights, times their values' scales, for each row and head: relative to the largest of them, which a second pass over a
row's scores can know, and an online softmax cannot.  Both products are sums of integers and therefore exact, whatever
their order; what is left of floating point (the scores' factors, exponentials and their sum) is done in an order that
positions alone decide.  So a row's bits depend on its own sequence alone.  A weight less than 1/32512 of its row's
largest may be lost, which is far below what eight bits lose of the values themselves.  Knows nothing about models,
threads or requests.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from helix_gateway.core.inner_functions import INNER
from helix_gateway.runtime.cpu.attention_int8_kernels import (
    add_parts,
    copy_byte,
    copy_word,
    give_totals,
    largest,
    quantise,
    score_units,
    split,
    spread_bytes,
    top_score,
    weigh_scores,
    weigh_units,
)
from helix_gateway.runtime.cpu.attention_kernels import FLOATS, load_element, store_element
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
from helix_gateway.runtime.cpu.wide_products import HOST_WIDE, PLANES, TOP_16
from helix_gateway.runtime.kv_format import QUAD, SCALE_BYTES, TOP

MANY_ROWS = HOST_WIDE.max_rows
"""Most rows of queries that share one reading of keys and values."""

_FOURS, _SIXES = MANY_ROWS >= 4, MANY_ROWS >= 6
_OFFSET_LEFT, _FIRST_WORTH = HOST_WIDE.offset_left, HOST_WIDE.first_worth
_TOP = np.float32(TOP)
_TOP_16 = np.float32(TOP_16)
# Below this a largest number counts as zero: its inverse would be infinite.
_LEAST = np.float32(1e-35)
# Tokens whose weighted sum 32 bits hold, values with their offset.
_SUM_TOKENS = HOST_WIDE.most_tokens


@njit(cache=True, **INNER)
def _padded(dim, multiple):  # type: ignore[no-untyped-def]
    return (dim + multiple - 1) // multiple * multiple


@njit(cache=True, **INNER)
def _inverse(largest, top):  # type: ignore[no-untyped-def]
    """What makes numbers up to ``largest`` numbers up to ``top``."""
    return top / largest if largest > _LEAST else np.float32(0.0)


@njit(cache=True, **INNER)
def _write_key(kind, source, dim, place, unit, scale_at, buffer):  # type: ignore[no-untyped-def]
    """One head's key of one token to its slot at ``place``, and its scale."""
    top, words = largest(kind, source, dim), _padded(dim, QUAD) // QUAD
    quantise(kind, source, dim, _inverse(top, _TOP), buffer.ctypes.data)
    for word in range(words):
        copy_word(buffer.ctypes.data + word * QUAD, place + word * unit * QUAD)
    store_element(FLOATS, scale_at, top / _TOP)


@njit(cache=True, **INNER)
def _write_value(kind, source, dim, place, scale_at, buffer):  # type: ignore[no-untyped-def]
    """One head's value of one token to its slot at ``place``, and its scale."""
    top, numbers = largest(kind, source, dim), _padded(dim, QUAD)
    quantise(kind, source, dim, _inverse(top, _TOP), buffer.ctypes.data)
    spread_bytes(buffer.ctypes.data, place, numbers // LANES)
    for number in range(numbers // LANES * LANES, numbers):
        copy_byte(buffer.ctypes.data + number, place + number * QUAD)
    store_element(FLOATS, scale_at, top / _TOP)


@njit(cache=True, **INNER)
def _write_row(kind, stored, shape, offsets, table, position, row, key, value, buffer):  # type: ignore[no-untyped-def]
    """One token's keys and values into its unit; each source is (address, elements between rows, between heads)."""
    unit, key_dim, value_dim = shape[UNIT], shape[KEY_DIM], shape[VALUE_DIM]
    keys, values = _padded(key_dim, QUAD), _padded(value_dim, QUAD)
    start = stored.ctypes.data + unit_at(shape, offsets, table, position // unit)
    slot = position % unit
    for head in range(shape[KV_HEADS]):
        place = start + head * _head_bytes(shape)
        scales = place + (keys + values) * unit + slot * SCALE_BYTES
        source = key[0] + (row * key[1] + head * key[2]) * kind.itemsize
        _write_key(kind, source, key_dim, place + slot * QUAD, unit, scales, buffer)
        source = value[0] + (row * value[1] + head * value[2]) * kind.itemsize
        at = place + keys * unit + slot // QUAD * values * QUAD + slot % QUAD
        _write_value(kind, source, value_dim, at, scales + unit * SCALE_BYTES, buffer)


@njit(cache=True, **INNER)
def _head_bytes(shape):  # type: ignore[no-untyped-def]
    """Bytes of one KV head in a unit."""
    dims = _padded(shape[KEY_DIM], QUAD) + _padded(shape[VALUE_DIM], QUAD)
    return shape[UNIT] * (dims + 2 * SCALE_BYTES)


@njit(cache=True, **INNER)
def write_int8_rows(kind, stored, shape, offsets, plan, first, last, key, value):  # type: ignore[no-untyped-def]
    """Keys and values of the rows first:last into their pages; sources as `_write_row` has them."""
    buffer = np.empty(_padded(max(shape[KEY_DIM], shape[VALUE_DIM]), LANES), np.int8)
    for row in range(first, last):
        table = plan.tables[plan.row_sequence[row]]
        _write_row(kind, stored, shape, offsets, table, plan.positions[row], row, key, value, buffer)


class _Places(NamedTuple):
    """See `_places`."""

    step: int
    values: int
    queries: int
    factors: int
    starts: int
    scales: int
    scores: int
    weights: int
    sums: int
    totals: int
    end: int


@njit(cache=True, **INNER)
def _places(shape, rows, span):  # type: ignore[no-untyped-def]
    """Where an item's scratch for ``rows`` rows lies, in float32 from the thread's beginning, and how much there is.

    First ``step``, how many numbers a row of scores may have; then the places, in the order in which they lie behind the
    addresses of the units' keys and, from ``values`` on, of their values (int64, at the beginning): queries (bytes [rows, 2,
    key_dim up to a multiple of 16]), their factors [rows], their starts (int32 [rows, 2]), scales of values [step],
    scores [rows, step], weights (bytes [rows, 2, step]), sums (int32 [rows, 2, dims]), sums of all segments (float64 [rows,
    dims]); last, how much it is altogether.
    """
    step = (span + 2 * shape[UNIT]) // LANES * LANES + 3 * LANES
    values = _padded(2 * (span // shape[UNIT] + 2), LANES)
    queries = 2 * values
    factors = queries + rows * PLANES * _padded(shape[KEY_DIM], LANES) // F32_BYTES
    starts = factors + _padded(rows, LANES)
    scales = starts + _padded(PLANES * rows, LANES)
    scores = scales + step
    weights = scores + rows * step
    sums = weights + rows * step * PLANES // F32_BYTES
    totals = sums + rows * PLANES * _row_dims(shape)
    end = totals + 2 * rows * _row_dims(shape)
    return _Places(step, values, queries, factors, starts, scales, scores, weights, sums, totals, end)


@njit(cache=True, **INNER)
def int8_scratch(shape, rows, span):  # type: ignore[no-untyped-def]
    """Numbers of scratch (float32) that an item of ``rows`` rows a head over ``span`` positions needs."""
    return _places(shape, min(rows, MANY_ROWS), span).end


@njit(cache=True, **INNER)
def _row_dims(shape):  # type: ignore[no-untyped-def]
    """Numbers of a row's sums: those of a value, up to a multiple of 16."""
    return _padded(_padded(shape[VALUE_DIM], QUAD), LANES)


@njit(cache=True, **INNER)
def _take_query(kind, source, dim, scaling, work, query, factor_at, start_at):  # type: ignore[no-untyped-def]
    """One row's query as two bytes a dimension, what its scores are multiplied by, and what its sums begin with."""
    ints, top, width = work.view(np.int32), largest(kind, source, dim), _padded(dim, LANES)
    first = work.ctypes.data + query * F32_BYTES
    total, second = split(kind, source, dim, _inverse(top, _TOP_16), first, first + width)
    work[factor_at] = top / _TOP_16 * np.float32(scaling)
    ints[start_at], ints[start_at + 1] = -_OFFSET_LEFT * ((total - second) // _FIRST_WORTH), -_OFFSET_LEFT * second


@njit(cache=True, **INNER)
def _score_rows(rows, q, q_step, factors, starts, places, count, unit, words, scales, out, out_step):  # type: ignore[no-untyped-def]
    """`score_units` for any number of rows."""
    row = 0
    while row < rows:
        left = rows - row
        a, b, c, d = q + row * q_step, factors + row * F32_BYTES, starts + row * 2 * F32_BYTES, out + row * out_step
        if _SIXES and left >= 6:
            score_units(6, a, b, c, places, count, unit, words, scales, d, out_step)
            row += 6
        elif _FOURS and left >= 4:
            score_units(4, a, b, c, places, count, unit, words, scales, d, out_step)
            row += 4
        elif _FOURS and left == 3:
            score_units(3, a, b, c, places, count, unit, words, scales, d, out_step)
            row += 3
        elif left >= 2:
            score_units(2, a, b, c, places, count, unit, words, scales, d, out_step)
            row += 2
        else:
            score_units(1, a, b, c, places, count, unit, words, scales, d, out_step)
            row += 1


@njit(cache=True, **INNER)
def _weigh_rows(rows, weights, weight_step, plane_step, places, skip, count, words, dims, sums, sum_step):  # type: ignore[no-untyped-def]
    """`weigh_units` for any number of rows."""
    row = 0
    while row < rows:
        left = rows - row
        a, b = weights + row * weight_step, sums + row * sum_step
        if _SIXES and left >= 6:
            weigh_units(6, a, weight_step, plane_step, places, skip, count, words, dims, b, sum_step)
            row += 6
        elif _FOURS and left >= 4:
            weigh_units(4, a, weight_step, plane_step, places, skip, count, words, dims, b, sum_step)
            row += 4
        elif _FOURS and left == 3:
            weigh_units(3, a, weight_step, plane_step, places, skip, count, words, dims, b, sum_step)
            row += 3
        elif left >= 2:
            weigh_units(2, a, weight_step, plane_step, places, skip, count, words, dims, b, sum_step)
            row += 2
        else:
            weigh_units(1, a, weight_step, plane_step, places, skip, count, words, dims, b, sum_step)
            row += 1


@njit(cache=True, **INNER)
def _find_units(stored, shape, offsets, table, head, begin, column, count, at, work):  # type: ignore[no-untyped-def]
    """Where ``count`` units from number ``begin`` on keep one head's keys and values, and, from a column on, their scales."""
    unit, keys, values = shape[UNIT], _padded(shape[KEY_DIM], QUAD), _padded(shape[VALUE_DIM], QUAD)
    places, values_at = work.view(np.int64), at.values // 2
    for number in range(count):
        place = stored.ctypes.data + unit_at(shape, offsets, table, begin + number) + head * _head_bytes(shape)
        places[number], places[values_at + number] = place, place + keys * unit
        source = place + (keys + values + SCALE_BYTES) * unit
        for lane in range(unit):
            scale = load_element(FLOATS, source + lane * SCALE_BYTES)
            work[at.scales + column + number * unit + lane] = scale


@njit(cache=True, **INNER)
def _score(shape, rows, first, count, at, work):  # type: ignore[no-untyped-def]
    """The scores of some queries at the columns of ``count`` units, ``first`` the first of them."""
    unit, keys, values = shape[UNIT], _padded(shape[KEY_DIM], QUAD), _padded(shape[VALUE_DIM], QUAD)
    address = work.ctypes.data
    _score_rows(
        rows,
        address + at.queries * F32_BYTES,
        PLANES * _padded(shape[KEY_DIM], LANES),
        address + at.factors * F32_BYTES,
        address + at.starts * F32_BYTES,
        address,
        count,
        unit,
        keys // QUAD,
        (keys + values) * unit,
        address + (at.scores + first) * F32_BYTES,
        at.step * F32_BYTES,
    )


@njit(cache=True, **INNER)
def _cap_scores(work, scores, first, last, softcap):  # type: ignore[no-untyped-def]
    for i in range(scores + first, scores + last):
        work[i] = softcapped(work[i], softcap)


@njit(cache=True, **INNER)
def _seen_columns(shape, positions, member, base):  # type: ignore[no-untyped-def]
    """The columns, first and end, that a tile's row sees of its head."""
    position = positions[member // shape[GROUP]]
    return first_seen(position, shape[WINDOW]) - base, position + 1 - base


@njit(cache=True, **INNER)
def _weigh(shape, positions, member, rows, base, first, last, softcap, at, work):  # type: ignore[no-untyped-def]
    """Scores at the columns first:last to weights in two bytes each, zero where a row sees nothing; ``member``: the first row.

    What an integer sum of weighted values is to be multiplied by takes the factors' place; the sums of all segments begin
    with what the values' offset makes too much.  No loop over rows waits for one of them, so the processor works at several.
    """
    begin, blocks = first // LANES * LANES, (last + LANES - 1) // LANES - first // LANES
    address, exact, dims = work.ctypes.data, work.view(np.float64), _row_dims(shape)
    for i in range(rows):
        seen, end = _seen_columns(shape, positions, member + i, base)
        if softcap < np.inf:
            _cap_scores(work, at.scores + i * at.step, seen, end, softcap)
        row = address + (at.scores + i * at.step) * F32_BYTES
        work[at.factors + i] = top_score(row, seen, end, begin, blocks)
    for i in range(rows):
        seen, end = _seen_columns(shape, positions, member + i, base)
        row = address + (at.scores + i * at.step) * F32_BYTES
        total, most = weigh_scores(row, address + at.scales * F32_BYTES, seen, end, begin, blocks, work[at.factors + i])
        work[at.factors + i], exact[at.totals // 2 + i * dims] = most / _TOP_16 / total, most
    for i in range(rows):
        own, source = at.totals // 2 + i * dims, address + (at.scores + i * at.step + begin) * F32_BYTES
        plane = address + at.weights * F32_BYTES + PLANES * i * at.step + begin
        inverse = _inverse(np.float32(exact[own]), _TOP_16)
        total, _ = split(FLOATS, source, blocks * LANES, inverse, plane, plane + at.step)
        exact[own : own + dims] = -_OFFSET_LEFT * np.float64(total)


@njit(cache=True, **INNER)
def _add_values(shape, rows, first, count, at, work):  # type: ignore[no-untyped-def]
    """The weighted values of ``count`` units, whose columns begin at ``first``."""
    unit, dims, address, ints = shape[UNIT], _row_dims(shape), work.ctypes.data, work.view(np.int32)
    values, sums, sum_step = _padded(shape[VALUE_DIM], QUAD), address + at.sums * F32_BYTES, PLANES * dims * F32_BYTES
    # So many tokens at a time as a sum holds: some units, or a part of one.
    most, together = max(1, _SUM_TOKENS // unit), min(unit, _SUM_TOKENS)
    for begin in range(0, count, most):
        for token in range(0, unit, together):
            now, tokens = min(most, count - begin), min(together, unit - token)
            ints[at.sums : at.sums + PLANES * rows * dims] = 0
            weights = address + at.weights * F32_BYTES + first + begin * unit + token
            units, step = address + (at.values + 2 * begin) * F32_BYTES, at.step
            _weigh_rows(
                rows, weights, PLANES * step, step, units, token * values, now, tokens // QUAD, values, sums, sum_step
            )
            for row in range(rows):
                into = address + (at.totals + 2 * row * dims) * F32_BYTES
                add_parts(sums + row * sum_step, dims * F32_BYTES, into, dims // LANES)


@njit(cache=True, **INNER)
def attend_int8_item(kind, stored, shape, offsets, plan, item, query, scaling, softcap, out, work):  # type: ignore[no-untyped-def]
    """One tile and some of its KV heads, one head after another, as many rows at a time as the kernels take."""
    tile, part = item // plan.parts, item % plan.parts
    row, tokens = plan.tile_row[tile], plan.tile_tokens[tile]
    table, positions = plan.tables[plan.row_sequence[row]], plan.positions[row : row + tokens]
    group, unit, heads = shape[GROUP], shape[UNIT], shape[KV_HEADS]
    least, stop = first_seen(positions.min(), shape[WINDOW]), positions.max() + 1
    begin = least // unit * unit
    base = begin // LANES * LANES
    first, last = begin - base, _padded(stop, unit) - base
    count, depth, dims = (last - first) // unit, shape[KEY_DIM], shape[VALUE_DIM]
    at = _places(shape, min(tokens * group, MANY_ROWS), stop - least)
    words = PLANES * _padded(depth, LANES) // F32_BYTES
    for head in range(heads * part // plan.parts, heads * (part + 1) // plan.parts):
        _find_units(stored, shape, offsets, table, head, begin // unit, first, count, at, work)
        for member in range(0, tokens * group, MANY_ROWS):
            rows = min(MANY_ROWS, tokens * group - member)
            for i in range(rows):
                token, own = row + (member + i) // group, head * group + (member + i) % group
                source = query[0] + (token * query[1] + own * query[2]) * kind.itemsize
                places = at.queries + i * words, at.factors + i, at.starts + PLANES * i
                _take_query(kind, source, depth, scaling, work, *places)
            _score(shape, rows, first, count, at, work)
            _weigh(shape, positions, member, rows, base, first, last, softcap, at, work)
            _add_values(shape, rows, first, count, at, work)
            for i in range(rows):
                token, own = row + (member + i) // group, head * group + (member + i) % group
                place = out + (token * heads * group + own) * dims * kind.itemsize
                exact = work.ctypes.data + (at.totals + 2 * i * _row_dims(shape)) * F32_BYTES
                give_totals(kind, exact, dims, work[at.factors + i], place)
