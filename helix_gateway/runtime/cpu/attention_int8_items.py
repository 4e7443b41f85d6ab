"""Attention of one item over int8 pages, and the writing of quantised keys and values; the siblings of those in
`attention_items.py`, where a tile, an item and a plan are told.

Within a unit each KV head has, one after another: keys [key_dim / 4, unit_tokens, 4], so that lanes are tokens; values
[unit_tokens / 4, value_dim, 4], so that lanes are dimensions; the keys' scales and the values' scales, float32
[unit_tokens] each.  A byte is the quantised number plus 128.

Queries are quantised to 16 bits for each row and head.  So are attention weights, times their values' scales, for each row
and head: relative to the largest of them, which a second pass over a row's scores can know, and an online softmax
cannot.  Both products are sums of integers and therefore exact, whatever their order; what is left of floating point (the
scores' factors, exponentials and their sum) is done in an order that positions alone decide.  So a row's bits depend on
its own sequence alone.  A weight less than 1/32512 of its row's largest may be lost, which is far below what eight bits
lose of the values themselves.  Knows nothing about models, threads or requests.
"""

import numpy as np
from numba import njit

from helix_gateway.runtime.cpu.attention_int8_kernels import (
    MANY_ROWS,
    OFFSET_LEFT,
    copy_byte,
    copy_word,
    largest,
    quantise,
    score_units,
    split,
    sum_bytes,
    top_score,
    weigh_scores,
    weigh_units,
)
from helix_gateway.runtime.cpu.attention_kernels import load_element, store_element
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
from helix_gateway.runtime.kv_format import QUAD, SCALE_BYTES, TOP

_WIDE = MANY_ROWS >= 6
_TOP = np.float32(TOP)
# The largest number of two signed bytes, 256 * high + low, whose high byte is at most 127 whatever the low one.
_TOP_16 = np.float32(127 * 256)
# Below this a largest number counts as zero: its inverse would be infinite.
_LEAST = np.float32(1e-35)
_HIGH = np.float64(256.0)
# Tokens whose weighted sum 32 bits hold: 127 * 127 * 2**17 < 2**31.
_SUM_TOKENS = 1 << 17
_PARTS = 2
# Tells that elements are float32.
_FLOATS = np.empty(0, np.float32)


@njit(cache=True)
def _padded(dim, multiple):  # type: ignore[no-untyped-def]
    return (dim + multiple - 1) // multiple * multiple


@njit(cache=True)
def _inverse(largest, top):  # type: ignore[no-untyped-def]
    """What makes numbers up to ``largest`` numbers up to ``top``."""
    return top / largest if largest > _LEAST else np.float32(0.0)


@njit(cache=True)
def _write_key(kind, source, dim, place, unit, scale_at, buffer):  # type: ignore[no-untyped-def]
    """One head's key of one token to its slot at ``place``, and its scale."""
    top, words = largest(kind, source, dim), _padded(dim, QUAD) // QUAD
    quantise(kind, source, dim, _inverse(top, _TOP), buffer.ctypes.data)
    for word in range(words):
        copy_word(buffer.ctypes.data + word * QUAD, place + word * unit * QUAD)
    store_element(_FLOATS, scale_at, top / _TOP)


@njit(cache=True)
def _write_value(kind, source, dim, place, scale_at, buffer):  # type: ignore[no-untyped-def]
    """One head's value of one token to its slot at ``place``, and its scale."""
    top = largest(kind, source, dim)
    quantise(kind, source, dim, _inverse(top, _TOP), buffer.ctypes.data)
    for number in range(_padded(dim, QUAD)):
        copy_byte(buffer.ctypes.data + number, place + number * QUAD)
    store_element(_FLOATS, scale_at, top / _TOP)


@njit(cache=True)
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


@njit(cache=True)
def _head_bytes(shape):  # type: ignore[no-untyped-def]
    """Bytes of one KV head in a unit."""
    dims = _padded(shape[KEY_DIM], QUAD) + _padded(shape[VALUE_DIM], QUAD)
    return shape[UNIT] * (dims + 2 * SCALE_BYTES)


@njit(cache=True)
def write_int8_rows(kind, stored, shape, offsets, plan, first, last, key, value):  # type: ignore[no-untyped-def]
    """Keys and values of the rows first:last into their pages; sources as `_write_row` has them."""
    buffer = np.empty(_padded(max(shape[KEY_DIM], shape[VALUE_DIM]), LANES), np.int8)
    for row in range(first, last):
        table = plan.tables[plan.row_sequence[row]]
        _write_row(kind, stored, shape, offsets, table, plan.positions[row], row, key, value, buffer)


@njit(cache=True)
def _places(shape, rows, span):  # type: ignore[no-untyped-def]
    """Where an item's scratch lies, in float32 from the thread's beginning, and how much there is.

    First ``step``, how many numbers a row of scores may have; then the places, in the order in which they lie behind the
    units' addresses (int64, at the beginning): queries (bytes [rows, 2, key_dim up to a multiple of 16]), their factors
    [rows], their starts (int32 [rows, 2]), scales of values [step], scores [rows, step], weights (bytes [rows, 2, step]),
    sums (int32 [rows, 2, dims]), sums of all segments (float64 [rows, dims]); last, how much it is altogether.
    """
    step = (span + 2 * shape[UNIT]) // LANES * LANES + 3 * LANES
    units = span // shape[UNIT] + 2
    dims = _padded(shape[VALUE_DIM], LANES)
    queries = _padded(2 * units, LANES)
    factors = queries + rows * _PARTS * _padded(shape[KEY_DIM], LANES) // F32_BYTES
    starts = factors + _padded(rows, LANES)
    scales = starts + _padded(_PARTS * rows, LANES)
    scores = scales + step
    weights = scores + rows * step
    sums = weights + rows * step * _PARTS // F32_BYTES
    totals = sums + rows * _PARTS * dims
    return step, queries, factors, starts, scales, scores, weights, sums, totals, totals + 2 * rows * dims


@njit(cache=True)
def int8_scratch(shape, rows, span):  # type: ignore[no-untyped-def]
    """Numbers of scratch (float32) that an item of ``rows`` rows a head over ``span`` positions needs."""
    return _places(shape, rows, span)[-1]


@njit(cache=True)
def _take_query(kind, source, dim, scaling, work, query, factor_at, start_at):  # type: ignore[no-untyped-def]
    """One row's query as two bytes a dimension, what its scores are multiplied by, and what its sums begin with."""
    ints, top, width = work.view(np.int32), largest(kind, source, dim), _padded(dim, LANES)
    high = work.ctypes.data + query * F32_BYTES
    split(kind, source, dim, _inverse(top, _TOP_16), high, high + width)
    work[factor_at] = top / _TOP_16 * np.float32(scaling)
    for part in range(_PARTS):
        ints[start_at + part] = -OFFSET_LEFT * sum_bytes(high + part * width, width // LANES)


@njit(cache=True)
def _score_rows(rows, q, q_step, factors, starts, places, count, unit, words, scales, out, out_step):  # type: ignore[no-untyped-def]
    """`score_units` for any number of rows."""
    row = 0
    while row < rows:
        left = rows - row
        a, b, c, d = q + row * q_step, factors + row * F32_BYTES, starts + row * 2 * F32_BYTES, out + row * out_step
        if _WIDE and left >= 6:
            score_units(6, a, b, c, places, count, unit, words, scales, d, out_step)
            row += 6
        elif _WIDE and left >= 4:
            score_units(4, a, b, c, places, count, unit, words, scales, d, out_step)
            row += 4
        elif _WIDE and left == 3:
            score_units(3, a, b, c, places, count, unit, words, scales, d, out_step)
            row += 3
        elif left >= 2:
            score_units(2, a, b, c, places, count, unit, words, scales, d, out_step)
            row += 2
        else:
            score_units(1, a, b, c, places, count, unit, words, scales, d, out_step)
            row += 1


@njit(cache=True)
def _weigh_rows(rows, weights, weight_step, low, places, count, words, dims, sums, sum_step):  # type: ignore[no-untyped-def]
    """`weigh_units` for any number of rows."""
    row = 0
    while row < rows:
        left = rows - row
        a, b = weights + row * weight_step, sums + row * sum_step
        if _WIDE and left >= 6:
            weigh_units(6, a, weight_step, low, places, count, words, dims, b, sum_step)
            row += 6
        elif _WIDE and left >= 4:
            weigh_units(4, a, weight_step, low, places, count, words, dims, b, sum_step)
            row += 4
        elif _WIDE and left == 3:
            weigh_units(3, a, weight_step, low, places, count, words, dims, b, sum_step)
            row += 3
        elif left >= 2:
            weigh_units(2, a, weight_step, low, places, count, words, dims, b, sum_step)
            row += 2
        else:
            weigh_units(1, a, weight_step, low, places, count, words, dims, b, sum_step)
            row += 1


@njit(cache=True)
def _weigh_row(work, row, first, last, softcap, scales, bytes_at, step):  # type: ignore[no-untyped-def]
    """A row's scores at ``row + first : row + last`` to weights in two bytes each, zero elsewhere in its ``step`` columns.

    Returns what an integer sum of weighted values is to be multiplied by.
    """
    begin, end = first // LANES * LANES, (last + LANES - 1) // LANES * LANES
    if softcap < np.inf:
        for i in range(row + first, row + last):
            work[i] = softcapped(work[i], softcap)
    scores, scale_at = work.ctypes.data + row * F32_BYTES, work.ctypes.data + scales * F32_BYTES
    blocks = (end - begin) // LANES
    top = top_score(scores, first, last, begin, blocks)
    total, most = weigh_scores(scores, scale_at, first, last, begin, blocks, top)
    words, high, low = work.view(np.int8), bytes_at, bytes_at + step
    for part in (high, low):
        words[part : part + begin] = 0
        words[part + end : part + step] = 0
    address = work.ctypes.data
    into, source = address + begin, scores + begin * F32_BYTES
    split(_FLOATS, source, end - begin, _inverse(most, _TOP_16), into + high, into + low)
    return most / _TOP_16 / total


@njit(cache=True)
def _begin_sums(work, weights, sums, columns, dims):  # type: ignore[no-untyped-def]
    """What a row's sums of high or of low bytes begin with: what is left of the offset of whole units' columns is taken off."""
    ints, whole = work.view(np.int32), columns // LANES
    total = sum_bytes(work.ctypes.data + weights, whole) if whole > 0 else np.int32(0)
    words = work.view(np.int8)
    for i in range(whole * LANES, columns):
        total += np.int32(words[weights + i])
    ints[sums : sums + dims] = -OFFSET_LEFT * total


@njit(cache=True)
def _give_row(kind, work, totals, dims, factor, out):  # type: ignore[no-untyped-def]
    """A row's output from its exact sums."""
    exact = work.view(np.float64)
    for dim in range(dims):
        store_element(kind, out + dim * kind.itemsize, np.float32(exact[totals // 2 + dim]) * factor)


@njit(cache=True)
def _add_sums(work, rows, dims, sums, totals):  # type: ignore[no-untyped-def]
    """A segment's integer sums [rows, 2, dims] to those of all segments [rows, dims], exactly."""
    ints, exact = work.view(np.int32), work.view(np.float64)
    for row in range(rows):
        high, into = sums + row * _PARTS * dims, totals // 2 + row * dims
        for dim in range(dims):
            exact[into + dim] += _HIGH * np.float64(ints[high + dim]) + np.float64(ints[high + dims + dim])


@njit(cache=True)
def _score_head(stored, shape, offsets, table, head, rows, base, first, last, at, work):  # type: ignore[no-untyped-def]
    """One head's scores at the columns first:last (whole units) of its rows, and their values' scales."""
    step, queries, factors, starts, scales, scores = at[:6]
    unit, keys, values = shape[UNIT], _padded(shape[KEY_DIM], QUAD), _padded(shape[VALUE_DIM], QUAD)
    data, address = stored.ctypes.data, work.ctypes.data
    places = work.view(np.int64)
    count, scale_at = (last - first) // unit, (keys + values) * unit
    for number in range(count):
        place = data + unit_at(shape, offsets, table, (base + first) // unit + number) + head * _head_bytes(shape)
        places[number] = place
        column, source = scales + first + number * unit, place + scale_at + unit * SCALE_BYTES
        for lane in range(unit):
            work[column + lane] = load_element(_FLOATS, source + lane * SCALE_BYTES)
    _score_rows(
        rows,
        address + queries * F32_BYTES,
        _PARTS * _padded(shape[KEY_DIM], LANES),
        address + factors * F32_BYTES,
        address + starts * F32_BYTES,
        address,
        count,
        unit,
        keys // QUAD,
        scale_at,
        address + (scores + first) * F32_BYTES,
        step * F32_BYTES,
    )


@njit(cache=True)
def _add_head(shape, rows, first, last, at, work):  # type: ignore[no-untyped-def]
    """One head's weighted values at the columns first:last (whole units), whose places `_score_head` has left."""
    step, weights, sums, totals = at[0], at[6], at[7], at[8]
    unit, keys, values = shape[UNIT], _padded(shape[KEY_DIM], QUAD), _padded(shape[VALUE_DIM], QUAD)
    dims, count, address = _padded(values, LANES), (last - first) // unit, work.ctypes.data
    places = work.view(np.int64)
    for number in range(count):
        places[number] += keys * unit
    work.view(np.float64)[totals // 2 : totals // 2 + rows * dims] = 0.0
    most = _SUM_TOKENS // unit
    for begin in range(0, count, most):
        now = min(most, count - begin)
        column = first + begin * unit
        for part in range(_PARTS * rows):
            _begin_sums(work, weights * F32_BYTES + part * step + column, sums + part * dims, now * unit, dims)
        a, b = address + weights * F32_BYTES + column, address + sums * F32_BYTES
        units = address + begin * 8
        _weigh_rows(rows, a, _PARTS * step, step, units, now, unit // QUAD, values, b, _PARTS * dims * F32_BYTES)
        _add_sums(work, rows, dims, sums, totals)


@njit(cache=True)
def attend_int8_item(kind, stored, shape, offsets, plan, item, query, scaling, softcap, out, work):  # type: ignore[no-untyped-def]
    """One tile and some of its KV heads, one head after another."""
    tile, part = item // plan.parts, item % plan.parts
    row, tokens = plan.tile_row[tile], plan.tile_tokens[tile]
    table, positions = plan.tables[plan.row_sequence[row]], plan.positions[row : row + tokens]
    group, unit, heads = shape[GROUP], shape[UNIT], shape[KV_HEADS]
    least, stop = first_seen(positions.min(), shape[WINDOW]), positions.max() + 1
    rows, begin = tokens * group, least // unit * unit
    base = begin // LANES * LANES
    first, last = begin - base, _padded(stop, unit) - base
    at = _places(shape, rows, stop - least)
    step, queries, factors, starts, scales, scores, weights, totals = (
        at[0],
        at[1],
        at[2],
        at[3],
        at[4],
        at[5],
        at[6],
        at[8],
    )
    depth, dims = shape[KEY_DIM], _padded(_padded(shape[VALUE_DIM], QUAD), LANES)
    words = _PARTS * _padded(depth, LANES) // F32_BYTES
    for head in range(heads * part // plan.parts, heads * (part + 1) // plan.parts):
        for i in range(rows):
            source = (row + i // group) * query[1] + (head * group + i % group) * query[2]
            _take_query(
                kind,
                query[0] + source * kind.itemsize,
                depth,
                scaling,
                work,
                queries + i * words,
                factors + i,
                starts + _PARTS * i,
            )
        _score_head(stored, shape, offsets, table, head, rows, base, first, last, at, work)
        for i in range(rows):
            position = positions[i // group]
            seen = first_seen(position, shape[WINDOW]) - base
            bytes_at = weights * F32_BYTES + _PARTS * i * step
            work[factors + i] = _weigh_row(
                work, scores + i * step, seen, position + 1 - base, softcap, scales, bytes_at, step
            )
        _add_head(shape, rows, first, last, at, work)
        for i in range(rows):
            token, member = row + i // group, head * group + i % group
            place = (token * heads * group + member) * shape[VALUE_DIM]
            _give_row(
                kind, work, totals + 2 * i * dims, shape[VALUE_DIM], work[factors + i], out + place * kind.itemsize
            )
