"""The inner loops of CPU attention as LLVM vector code: scores of 16 keys, weighted sums of values, row maximum and sum.

Each is a numba intrinsic over raw addresses.  `kind` is any array whose dtype says how keys and values are stored:
float32, or uint16 for the bits of bfloat16; sums are float32 always.  The order of every sum is fixed by the caller's
loop bounds, never by the vector width: a key's score is one chain of fused multiply-adds over its dimensions (lanes are
keys), an output dimension is one chain over keys (lanes are dimensions).  Knows nothing about pages, heads or threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from helix_gateway.runtime.cpu.emitter import (
    F32,
    F32_BYTES,
    F32S,
    I16,
    I16S,
    I32,
    I32S,
    I64,
    LANES,
    VECTOR_BYTES,
    Emitter,
    constant,
)
from helix_gateway.runtime.cpu.instruction_sets import target_features

WIDE_ROWS = 8 if "avx512f" in target_features() else 4
"""Most rows that one call of `dot_keys` or `add_values` keeps in registers: 32 of them on AVX-512, 16 elsewhere."""

_HALF_BYTES = 2
_MANY_ROWS = 8
"""Rows from which on computing takes longer than loading, so that nothing need be fetched ahead."""

FLOATS = np.empty(0, np.float32)
"""A `kind` that tells that elements are float32."""

Emit = Callable[[Any, ir.IRBuilder, Any, Any], ir.Value]


def _element_bytes(kind: types.Array) -> int:
    return int(kind.dtype.bitwidth) // 8


def load_vector(emitter: Emitter, kind: types.Array, address: ir.Value) -> ir.Value:
    """Sixteen stored elements as float32."""
    if _element_bytes(kind) == F32_BYTES:
        return emitter.load(address, F32S)
    return emitter.widened(emitter.load(address, I16S, _HALF_BYTES))


def store_vector(emitter: Emitter, kind: types.Array, vector: ir.Value, address: ir.Value) -> None:
    """Sixteen float32 as stored elements, rounded as `store_element` rounds."""
    emitter.store(vector if _element_bytes(kind) == F32_BYTES else emitter.rounded(vector), address, _HALF_BYTES)


@intrinsic
def load_element(typing_context, kind, address):  # type: ignore[no-untyped-def]
    """The stored element at an address, as float32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter = Emitter(builder)
        if _element_bytes(kind) == F32_BYTES:
            return emitter.load(args[1], F32)
        return emitter.widened(emitter.load(args[1], I16, _HALF_BYTES))

    return types.float32(kind, types.intp), emit


@intrinsic
def store_element(typing_context, kind, address, value):  # type: ignore[no-untyped-def]
    """Store a float32 at an address, rounded to nearest even where elements are bfloat16 (NaN stays NaN)."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (_, address, value) = Emitter(builder), args
        if _element_bytes(kind) != F32_BYTES:
            value = emitter.rounded(value)
        emitter.store(value, address, _HALF_BYTES)
        return context.get_dummy_value()

    return types.void(kind, types.intp, types.float32), emit


@intrinsic(prefer_literal=True)
def dot_keys(typing_context, kind, rows, q, q_step, keys, key_step, depth, out, out_step, ahead):  # type: ignore[no-untyped-def]
    """Scores of ``rows`` (a literal) queries against 16 keys that lie side by side.

    q: float32 [rows, depth], ``q_step`` bytes a row; keys: [depth, 16], ``key_step`` bytes a dimension;
    out: float32 [rows, 16], ``out_step`` bytes a row.  Each score is one fma chain over the depth.
    ``ahead``: how many bytes farther the keys lie that will be wanted next.
    """
    count = rows.literal_value

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (_, _, q, q_step, keys, key_step, depth, out, out_step, ahead) = Emitter(builder), args
        q_rows = [emitter.offset(q, row, q_step) for row in range(count)]

        def body(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            offset = builder.mul(index, key_step)
            if count < _MANY_ROWS:
                emitter.prefetch(builder.add(keys, builder.add(ahead, offset)))
            key = load_vector(emitter, kind, builder.add(keys, offset))
            values = [emitter.load(emitter.offset(row, index, F32_BYTES), F32) for row in q_rows]
            return [emitter.fma(key, emitter.splat(value), total) for value, total in zip(values, sums)]

        for row, total in enumerate(emitter.count(depth, [constant(F32S, 0.0)] * count, body)):
            emitter.store(total, emitter.offset(out, row, out_step))
        return context.get_dummy_value()

    return types.void(kind, rows, *[types.intp] * 8), emit


@intrinsic(prefer_literal=True)
def add_values(typing_context, kind, rows, p, p_step, values, value_step, count, sums, sum_step, vectors, ahead):  # type: ignore[no-untyped-def]
    """Add ``count`` values, weighted, to ``rows`` (a literal) sums over ``16 * vectors`` dimensions.

    p: float32 [rows, count], ``p_step`` bytes a row; values: [count, 16 * vectors], ``value_step`` bytes a value;
    sums: float32 [rows, 16 * vectors], ``sum_step`` bytes a row.  Each sum is one fma chain over the count (at least 1).
    ``ahead``: how many bytes farther the values lie that will be wanted next.
    """
    num_rows = rows.literal_value
    width = 2 if num_rows * 2 <= WIDE_ROWS else 1

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, _, p, p_step, values, value_step, count, sums, sum_step, vectors, ahead = args
        span = _Span(kind, num_rows, p, p_step, values, value_step, count, sums, sum_step, ahead)
        emitter, step = Emitter(builder), ir.Constant(I64, width)
        full = builder.udiv(vectors, step)
        with builder.if_then(builder.icmp_signed(">", full, ir.Constant(I64, 0))):
            emitter.count(full, [], lambda index, _: _emit_values(emitter, span, builder.mul(index, step), width))
        done = builder.mul(full, step)
        with builder.if_then(builder.icmp_signed("<", done, vectors)):
            _emit_values(emitter, span, done, 1)
        return context.get_dummy_value()

    return types.void(kind, rows, *[types.intp] * 9), emit


@dataclass(frozen=True, slots=True)
class _Span:
    """The arguments of `add_values`, as IR values."""

    kind: types.Array
    rows: int
    p: ir.Value
    p_step: ir.Value
    values: ir.Value
    value_step: ir.Value
    count: ir.Value
    sums: ir.Value
    sum_step: ir.Value
    ahead: ir.Value


def _emit_values(emitter: Emitter, span: _Span, first: ir.Value, width: int) -> list[ir.Value]:
    """All rows' sums over ``width`` vectors of dimensions from vector ``first`` on, kept in registers over the count."""
    builder, vector_bytes = emitter.builder, LANES * _element_bytes(span.kind)
    weights = [emitter.offset(span.p, row, span.p_step) for row in range(span.rows)]
    columns = [builder.add(first, ir.Constant(I64, vector)) for vector in range(width)]
    rows = [emitter.offset(span.sums, row, span.sum_step) for row in range(span.rows)]
    places = [emitter.offset(row, column, VECTOR_BYTES) for row in rows for column in columns]

    def body(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
        base = emitter.offset(span.values, index, span.value_step)
        addresses = [emitter.offset(base, column, vector_bytes) for column in columns]
        if span.rows < _MANY_ROWS:
            for address in addresses:
                emitter.prefetch(builder.add(span.ahead, address))
        vectors = [load_vector(emitter, span.kind, address) for address in addresses]
        spread = [emitter.splat(emitter.load(emitter.offset(row, index, F32_BYTES), F32)) for row in weights]
        pairs = [(weight, vector) for weight in spread for vector in vectors]
        return [emitter.fma(vector, weight, total) for (weight, vector), total in zip(pairs, totals)]

    for place, total in zip(places, emitter.count(span.count, [emitter.load(at, F32S) for at in places], body)):
        emitter.store(total, place)
    return []


def _fold(builder: ir.IRBuilder, vector: ir.Value, join: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """Join the lanes of a vector pairwise, the upper half onto the lower, down to one."""
    half = LANES // 2
    while half:
        picks = ir.Constant(I32S, [(lane + half) % LANES for lane in range(LANES)])
        vector = join(vector, builder.shuffle_vector(vector, ir.Constant(F32S, ir.Undefined), picks))
        half //= 2
    return builder.extract_element(vector, ir.Constant(I32, 0))


def _reduce(start: float, join: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Emit:
    """Emitter of a reduction over ``blocks`` vectors from an address: lane by lane, then across lanes."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (address, blocks) = Emitter(builder), args

        def body(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            return [join(builder, totals[0], emitter.load(emitter.offset(address, index, VECTOR_BYTES), F32S))]

        (total,) = emitter.count(blocks, [constant(F32S, start)], body)
        return _fold(builder, total, lambda a, b: join(builder, a, b))

    return emit


def _greater(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def row_max(typing_context, address, blocks):  # type: ignore[no-untyped-def]
    """The greatest of ``16 * blocks`` float32 values (blocks at least 1); ``-inf`` if there is none above it."""
    return types.float32(types.intp, types.intp), _reduce(float("-inf"), _greater)


@intrinsic
def row_sum(typing_context, address, blocks):  # type: ignore[no-untyped-def]
    """The sum of ``16 * blocks`` float32 values: lane i takes every 16th from the i-th on, then the lanes are joined."""
    return types.float32(types.intp, types.intp), _reduce(0.0, lambda builder, a, b: builder.fadd(a, b))
