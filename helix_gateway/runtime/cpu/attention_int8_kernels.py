"""The inner loops of attention over int8 pages: integer scores of 16 keys, and integer weighted sums of values.

Queries and attention weights have 16 bits a number, kept in two planes (`wide_products.py`); keys and values are one
unsigned byte, the quantised number plus 128, which the start of each sum takes off again where the instructions have not.
Sums are exact, so no order of them matters.
Each kernel is a numba intrinsic over raw addresses that walks a list of units.  Knows nothing about heads or threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from helix_gateway.runtime.cpu.emitter import (
    F32,
    F32_BYTES,
    F32S,
    I8,
    I8S,
    I16S,
    I32,
    I32S,
    I64,
    LANES,
    VECTOR_BYTES,
    Emitter,
    call,
    constant,
)
from helix_gateway.runtime.cpu.instruction_sets import target_features
from helix_gateway.runtime.cpu.math import ROUND
from helix_gateway.runtime.cpu.vector_math import exponential
from helix_gateway.runtime.cpu.wide_products import HOST_WIDE, PLANES

I64S, F64S = ir.VectorType(I64, LANES), ir.VectorType(ir.DoubleType(), LANES)

_MAGNITUDE = 0x7FFFFFFF
_ADDRESS_BYTES = 8
_WORD = 4
_F64_BYTES = 8
_WORTH, _NUM_SUMS = float(HOST_WIDE.first_worth), HOST_WIDE.num_sums


def _word(emitter: Emitter, address: ir.Value) -> ir.Value:
    """Four bytes, in every lane."""
    return emitter.splat(emitter.load(address, I32))


def _joined(emitter: Emitter, sums: list[ir.Value]) -> ir.Value:
    """What a row's sums come to, as float32, rounded once: two are exact in it up to a thousand dimensions."""
    first, *second = (emitter.builder.sitofp(part, F32S) for part in sums)
    return emitter.fma(first, constant(F32S, _WORTH), *second) if second else first


@dataclass(frozen=True, slots=True)
class _Keys:
    """The arguments of `score_units` after its number of rows, as IR values."""

    query: ir.Value
    factors: ir.Value
    starts: ir.Value
    places: ir.Value
    count: ir.Value
    unit: ir.Value
    words: ir.Value
    scales: ir.Value
    out: ir.Value
    out_step: ir.Value


@intrinsic(prefer_literal=True)
def score_units(typing_context, rows, query, factors, starts, places, count, unit, words, scales, out, out_step):  # type: ignore[no-untyped-def]
    """Scores of ``rows`` (a literal) queries against the keys of ``count`` units.

    Args:
        query: bytes [rows, planes, words up to a multiple of 4, 4].
        factors: float32 [rows], of each row's scores.
        starts: int32 [rows, 2], what a row's sums begin with.
        places: addresses [count], of each unit's keys [words, unit, 4].
        unit: tokens of a unit.
        words: dimensions of a key, in fours.
        scales: bytes from a unit's keys to their scales, float32 [unit].
        out: float32 [rows, count * unit], ``out_step`` bytes a row; what lies up to 15 numbers behind is overwritten.
    """
    number = rows.literal_value

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, keys = Emitter(builder), _Keys(*args[1:])
        blocks = builder.udiv(builder.add(keys.unit, ir.Constant(I64, LANES - 1)), ir.Constant(I64, LANES))

        def one_unit(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            place = emitter.load(emitter.offset(keys.places, index, _ADDRESS_BYTES), I64)
            first = builder.mul(index, keys.unit)

            def one_block(block: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                _score_block(emitter, number, keys, place, first, builder.mul(block, ir.Constant(I64, LANES)))
                return []

            return emitter.count(blocks, [], one_block)

        emitter.count(keys.count, [], one_unit)
        return context.get_dummy_value()

    return types.void(rows, *[types.intp] * 10), emit


def _score_block(emitter: Emitter, rows: int, keys: _Keys, place: ir.Value, first: ir.Value, lane: ir.Value) -> None:
    """Scores of 16 keys of the unit at ``place``, from ``lane`` on; the unit's first has the number ``first``."""
    builder = emitter.builder
    at, row_step = emitter.offset(place, lane, _WORD), builder.mul(keys.unit, ir.Constant(I64, _WORD))
    sixteens = builder.udiv(builder.add(keys.words, ir.Constant(I64, 3)), ir.Constant(I64, 4))
    half = builder.mul(sixteens, ir.Constant(I64, LANES))
    planes = [
        [emitter.offset(keys.query, PLANES * row + plane, half) for plane in range(PLANES)] for row in range(rows)
    ]
    starts = [PLANES * row + number for row in range(rows) for number in range(_NUM_SUMS)]

    def one_word(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        key = HOST_WIDE.taken(emitter, emitter.load(emitter.offset(at, index, row_step), I32S))
        following: list[ir.Value] = []
        for row, own in enumerate(planes):
            words = [_word(emitter, emitter.offset(plane, index, _WORD)) for plane in own]
            following += HOST_WIDE.add(emitter, sums[_NUM_SUMS * row : _NUM_SUMS * (row + 1)], key, words)
        return following

    first_sums = [_word(emitter, emitter.offset(keys.starts, start, _WORD)) for start in starts]
    sums = emitter.count(keys.words, first_sums, one_word)
    scale = emitter.load(builder.add(emitter.offset(place, lane, F32_BYTES), keys.scales), F32S)
    column = emitter.offset(keys.out, builder.add(first, lane), F32_BYTES)
    for row in range(rows):
        factor = emitter.splat(emitter.load(emitter.offset(keys.factors, row, F32_BYTES), F32))
        score = _joined(emitter, sums[_NUM_SUMS * row : _NUM_SUMS * (row + 1)])
        emitter.store(builder.fmul(score, builder.fmul(factor, scale)), emitter.offset(column, row, keys.out_step))


@dataclass(frozen=True, slots=True)
class _Values:
    """The arguments of `weigh_units` after its number of rows, as IR values."""

    weights: ir.Value
    weight_step: ir.Value
    plane_step: ir.Value
    places: ir.Value
    skip: ir.Value
    count: ir.Value
    words: ir.Value
    dims: ir.Value
    sums: ir.Value
    sum_step: ir.Value


@intrinsic(prefer_literal=True)
def weigh_units(typing_context, rows, weights, weight_step, plane_step, places, skip, count, words, dims, sums, sum_step):  # type: ignore[no-untyped-def]
    """Add the weighted values of ``count`` units to the sums of ``rows`` (a literal) rows.

    Args:
        weights: bytes [rows, tokens] of the first plane, ``weight_step`` bytes a row; the second ``plane_step`` bytes behind.
        places: addresses [count], of each unit's values [words, dims, 4].
        skip: bytes of a unit's values that are left out, those of its first tokens.
        words: tokens of a unit that are taken, in fours.
        dims: dimensions of a value; so many that are no multiple of 16 are read as if they were.
        sums: int32 [rows, 2, dims up to a multiple of 16], ``sum_step`` bytes a row.
    """
    number = rows.literal_value
    width = max(1, min(4, HOST_WIDE.max_sums // (_NUM_SUMS * number)))

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, values = Emitter(builder), _Values(*args[1:])
        vectors = builder.udiv(builder.add(values.dims, ir.Constant(I64, LANES - 1)), ir.Constant(I64, LANES))
        full = builder.udiv(vectors, ir.Constant(I64, width))
        with builder.if_then(builder.icmp_signed(">", full, ir.Constant(I64, 0))):
            emitter.count(
                full,
                [],
                lambda index, _: _weigh(
                    emitter, number, values, vectors, builder.mul(index, ir.Constant(I64, width)), width
                ),
            )
        done = builder.mul(full, ir.Constant(I64, width))
        left = builder.sub(vectors, done)
        with builder.if_then(builder.icmp_signed(">", left, ir.Constant(I64, 0))):
            emitter.count(
                left, [], lambda index, _: _weigh(emitter, number, values, vectors, builder.add(done, index), 1)
            )
        return context.get_dummy_value()

    return types.void(rows, *[types.intp] * 10), emit


def _weigh(
    emitter: Emitter, rows: int, values: _Values, vectors: ir.Value, first: ir.Value, width: int
) -> list[ir.Value]:
    """All rows' sums over ``width`` vectors of dimensions from vector ``first`` on, in registers over all units."""
    builder = emitter.builder
    columns = [builder.add(first, ir.Constant(I64, vector)) for vector in range(width)]
    part_step = builder.mul(vectors, ir.Constant(I64, VECTOR_BYTES))
    planes, homes = [], []
    for row in range(rows):
        weights, sums = (
            emitter.offset(values.weights, row, values.weight_step),
            emitter.offset(values.sums, row, values.sum_step),
        )
        planes.append([weights, builder.add(weights, values.plane_step)])
        parts = [sums, builder.add(sums, part_step)][:_NUM_SUMS]
        homes += [emitter.offset(part, column, VECTOR_BYTES) for column in columns for part in parts]
    line = builder.mul(values.dims, ir.Constant(I64, _WORD))

    def one_unit(unit: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
        place = builder.add(emitter.load(emitter.offset(values.places, unit, _ADDRESS_BYTES), I64), values.skip)
        before = builder.mul(unit, values.words)

        def one_word(index: ir.Value, inner: list[ir.Value]) -> list[ir.Value]:
            at = emitter.offset(place, index, line)
            loaded = [emitter.load(emitter.offset(at, column, VECTOR_BYTES), I32S) for column in columns]
            taken, token = [HOST_WIDE.taken(emitter, vector) for vector in loaded], builder.add(before, index)
            following: list[ir.Value] = []
            for own in planes:
                words = [_word(emitter, emitter.offset(plane, token, _WORD)) for plane in own]
                for vector in taken:
                    sums = inner[len(following) : len(following) + _NUM_SUMS]
                    following += HOST_WIDE.add(emitter, sums, vector, words)
            return following

        return emitter.count(values.words, totals, one_word)

    totals = [emitter.load(home, I32S) for home in homes]
    for home, total in zip(homes, emitter.count(values.count, totals, one_unit)):
        emitter.store(total, home)
    return []


def _load_some(emitter: Emitter, kind: types.Array, address: ir.Value, count: ir.Value) -> ir.Value:
    """Sixteen elements as float32, of which only the first ``count`` are read; the rest are zero."""
    if int(kind.dtype.bitwidth) == 32:
        return emitter.load_lanes(F32S, address, count, F32_BYTES)
    return emitter.widened(emitter.load_lanes(I16S, address, count, F32_BYTES // 2))


def _blocks(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    return builder.udiv(builder.add(count, ir.Constant(I64, LANES - 1)), ir.Constant(I64, LANES))


def _over_elements(
    emitter: Emitter,
    kind: types.Array,
    source: ir.Value,
    count: ir.Value,
    start: list[ir.Value],
    body: Callable[[ir.Value, ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """``body(first, values, carried)`` for each 16 of ``count`` elements (at least 1), the last ones filled with zeros."""
    builder, size = emitter.builder, int(kind.dtype.bitwidth) // 8

    def block(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        first = builder.mul(index, ir.Constant(I64, LANES))
        values = _load_some(emitter, kind, emitter.offset(source, first, size), builder.sub(count, first))
        return body(first, values, carried)

    return emitter.count(_blocks(builder, count), start, block)


def _greater_bits(builder: ir.IRBuilder, top: ir.Value, values: ir.Value) -> ir.Value:
    """The greater of bits and the bits of magnitudes, which are in the order of the magnitudes; NaN is above all."""
    bits = builder.and_(builder.bitcast(values, I32S), constant(I32S, _MAGNITUDE))
    return builder.select(builder.icmp_unsigned(">", bits, top), bits, top)


def _top_of(emitter: Emitter, bits: ir.Value) -> ir.Value:
    top = call(emitter.builder, f"llvm.vector.reduce.umax.v{LANES}i32", I32, bits)
    return emitter.builder.bitcast(top, F32)


def _nearest(emitter: Emitter, values: ir.Value) -> ir.Value:
    """The nearest integers, ties to even, of numbers below 2**22."""
    builder, shift = emitter.builder, constant(F32S, float(ROUND))
    bits = builder.bitcast(builder.fadd(values, shift), I32S)
    return builder.sub(bits, builder.bitcast(shift, I32S))


@intrinsic
def largest(typing_context, kind, source, count):  # type: ignore[no-untyped-def]
    """The greatest magnitude among ``count`` elements of the dtype of ``kind``; NaN if one is NaN."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (_, source, count) = Emitter(builder), args

        def body(first: ir.Value, values: ir.Value, tops: list[ir.Value]) -> list[ir.Value]:
            return [_greater_bits(builder, tops[0], values)]

        return _top_of(emitter, *_over_elements(emitter, kind, source, count, [constant(I32S, 0)], body))

    return types.float32(kind, types.intp, types.intp), emit


@intrinsic
def quantise(typing_context, kind, source, count, inverse, out):  # type: ignore[no-untyped-def]
    """``count`` elements times ``inverse``, rounded, plus 128, as bytes; ``out`` has room for a multiple of 16."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (_, source, count, inverse, out) = Emitter(builder), args
        factor = emitter.splat(inverse)

        def body(first: ir.Value, values: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            numbers = builder.trunc(_nearest(emitter, builder.fmul(values, factor)), I8S)
            emitter.store(builder.xor(numbers, constant(I8S, -128)), builder.add(out, first), 1)
            return []

        _over_elements(emitter, kind, source, count, [], body)
        return context.get_dummy_value()

    return types.void(kind, types.intp, types.intp, types.float32, types.intp), emit


@intrinsic
def split(typing_context, kind, source, count, inverse, first, second):  # type: ignore[no-untyped-def]
    """``count`` elements times ``inverse``, rounded, in two planes; both have room for a multiple of 16 bytes.

    Returns:
        the sum of the rounded numbers, and that of what belongs to the second sum; of up to a million elements.
    """
    result = types.UniTuple(types.int64, 2)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (_, source, count, inverse, *places) = Emitter(builder), args
        factor = emitter.splat(inverse)

        def body(first: ir.Value, values: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            numbers = _nearest(emitter, builder.fmul(values, factor))
            *planes, below = HOST_WIDE.planes(emitter, numbers)
            for plane, place in zip(planes, places):
                emitter.store(plane, builder.add(place, first), 1)
            return [builder.add(sums[0], numbers), builder.add(sums[1], below)]

        sums = _over_elements(emitter, kind, source, count, [constant(I32S, 0)] * 2, body)
        # Joined as 64 bits, which the sum of many lanes may need.
        joined = [call(builder, f"llvm.vector.reduce.add.v{LANES}i64", I64, builder.sext(part, I64S)) for part in sums]
        return context.make_tuple(builder, result, joined)

    return result(kind, types.intp, types.intp, types.float32, types.intp, types.intp), emit


@intrinsic
def add_parts(typing_context, sums, part_step, totals, blocks):  # type: ignore[no-untyped-def]
    """Add what ``16 * blocks`` sums come to, int32, the second ones ``part_step`` bytes behind, to as many float64."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (sums, part_step, totals, blocks) = Emitter(builder), args
        parts = [sums, builder.add(sums, part_step)][:_NUM_SUMS]

        def body(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            loaded = [emitter.load(emitter.offset(part, index, VECTOR_BYTES), I32S) for part in parts]
            joined, *second = (builder.sitofp(part, F64S) for part in loaded)
            if second:
                joined = builder.fadd(builder.fmul(joined, constant(F64S, _WORTH)), second[0])
            place = emitter.offset(totals, index, LANES * _F64_BYTES)
            emitter.store(builder.fadd(emitter.load(place, F64S, _F64_BYTES), joined), place, _F64_BYTES)
            return []

        emitter.count(blocks, [], body)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), emit


@intrinsic
def give_totals(typing_context, kind, totals, count, factor, out):  # type: ignore[no-untyped-def]
    """Elements of the dtype of ``kind``: ``count`` float64, each as float32, times ``factor``."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (_, totals, count, factor, out), size = Emitter(builder), args, int(kind.dtype.bitwidth) // 8
        factors = emitter.splat(factor)

        def body(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            exact = emitter.load(emitter.offset(totals, index, LANES * _F64_BYTES), F64S, _F64_BYTES)
            values = builder.fmul(builder.fptrunc(exact, F32S), factors)
            first = builder.mul(index, ir.Constant(I64, LANES))
            stored = values if size == F32_BYTES else emitter.rounded(values)
            emitter.store_lanes(stored, emitter.offset(out, first, size), builder.sub(count, first))
            return []

        emitter.count(_blocks(builder, count), [], body)
        return context.get_dummy_value()

    return types.void(kind, types.intp, types.intp, types.float32, types.intp), emit


def _seen(emitter: Emitter, first: ir.Value, last: ir.Value, column: ir.Value) -> ir.Value:
    """Which of the 16 columns from ``column`` on are in first:last."""
    builder = emitter.builder
    lanes = builder.add(emitter.splat(builder.trunc(column, I32)), ir.Constant(I32S, list(range(LANES))))
    above = builder.icmp_signed(">=", lanes, emitter.splat(builder.trunc(first, I32)))
    return builder.and_(above, builder.icmp_signed("<", lanes, emitter.splat(builder.trunc(last, I32))))


@intrinsic
def weigh_scores(typing_context, scores, scales, first, last, begin, blocks, top):  # type: ignore[no-untyped-def]
    """Scores to attention weights times their values' scales, in place; weights at first:last are wanted, others zero.

    Args:
        scores: float32, column 0.
        scales: float32, column 0.
        begin: the first column that is looked at, ``16 * blocks`` of them.
        top: the greatest score (float32).

    Returns:
        the exponentials' sum (lane i takes every 16th from the i-th on, then the lanes are joined), and the greatest weight.
    """
    result = types.UniTuple(types.float32, 2)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (scores, scales, first, last, begin, blocks, top) = Emitter(builder), args
        highest, zero = emitter.splat(top), constant(F32S, 0.0)

        def body(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            column = builder.add(begin, builder.mul(index, ir.Constant(I64, LANES)))
            seen, place = _seen(emitter, first, last, column), emitter.offset(scores, column, F32_BYTES)
            raw = builder.fsub(emitter.load(place, F32S), highest)
            share = builder.select(seen, exponential(emitter, raw), zero)
            scaled = builder.fmul(share, emitter.load(emitter.offset(scales, column, F32_BYTES), F32S))
            weight = builder.select(seen, scaled, zero)
            emitter.store(weight, place)
            return [builder.fadd(carried[0], share), _greater_bits(builder, carried[1], weight)]

        total, bits = emitter.count(blocks, [zero, constant(I32S, 0)], body)
        half = LANES // 2
        while half:
            picks = ir.Constant(I32S, [(lane + half) % LANES for lane in range(LANES)])
            total = builder.fadd(total, builder.shuffle_vector(total, zero, picks))
            half //= 2
        pair = [builder.extract_element(total, ir.Constant(I32, 0)), _top_of(emitter, bits)]
        return context.make_tuple(builder, result, pair)

    return result(*[types.intp] * 6, types.float32), emit


@intrinsic
def top_score(typing_context, scores, first, last, begin, blocks):  # type: ignore[no-untyped-def]
    """The greatest score at first:last; arguments as `weigh_scores` has them."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (scores, first, last, begin, blocks) = Emitter(builder), args
        least = constant(F32S, float("-inf"))

        def body(index: ir.Value, tops: list[ir.Value]) -> list[ir.Value]:
            column = builder.add(begin, builder.mul(index, ir.Constant(I64, LANES)))
            score = emitter.load(emitter.offset(scores, column, F32_BYTES), F32S)
            score = builder.select(_seen(emitter, first, last, column), score, least)
            return [builder.select(builder.fcmp_ordered(">", score, tops[0]), score, tops[0])]

        (tops,) = emitter.count(blocks, [least], body)
        return call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", F32, tops)

    return types.float32(*[types.intp] * 5), emit


@intrinsic
def copy_word(typing_context, source, target):  # type: ignore[no-untyped-def]
    """Four bytes from one address to another."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter = Emitter(builder)
        emitter.store(emitter.load(args[0], I32), args[1])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), emit


@intrinsic
def spread_bytes(typing_context, source, target, sixteens):  # type: ignore[no-untyped-def]
    """``16 * sixteens`` bytes from an address to every fourth byte from another; no byte between those is touched."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (source, target, sixteens) = Emitter(builder), args

        def body(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            numbers = emitter.load(emitter.offset(source, index, LANES), I8S, 1)
            _store_spread(emitter, numbers, emitter.offset(target, index, VECTOR_BYTES))
            return []

        with builder.if_then(builder.icmp_signed(">", sixteens, ir.Constant(I64, 0))):
            emitter.count(sixteens, [], body)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), emit


def _store_spread(emitter: Emitter, numbers: ir.Value, address: ir.Value) -> None:
    """Sixteen bytes to every fourth byte: other threads write those between at the same time."""
    builder = emitter.builder
    if "avx512bw" not in target_features():
        for lane in range(LANES):
            number = builder.extract_element(numbers, ir.Constant(I32, lane))
            emitter.store(number, emitter.offset(address, lane, _WORD), 1)
        return
    bytes_, mask = (ir.VectorType(kind, VECTOR_BYTES) for kind in (I8, ir.IntType(1)))
    words = builder.bitcast(builder.zext(numbers, I32S), bytes_)
    chosen = ir.Constant(mask, [int(place % _WORD == 0) for place in range(VECTOR_BYTES)])
    pointer = builder.inttoptr(address, bytes_.as_pointer())
    call(builder, f"llvm.masked.store.v{VECTOR_BYTES}i8.p0", ir.VoidType(), words, pointer, ir.Constant(I32, 1), chosen)


@intrinsic
def copy_byte(typing_context, source, target):  # type: ignore[no-untyped-def]
    """One byte from one address to another."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter = Emitter(builder)
        emitter.store(emitter.load(args[0], I8, 1), args[1], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), emit
