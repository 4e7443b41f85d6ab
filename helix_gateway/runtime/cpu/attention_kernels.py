"""The inner loops of CPU attention as LLVM vector code: scores of 16 keys, weighted sums of values, row maximum and sum.

Each is a numba intrinsic over raw addresses.  `kind` is any array whose dtype says how keys and values are stored:
float32, or uint16 for the bits of bfloat16; sums are float32 always.  The order of every sum is fixed by the caller's
loop bounds, never by the vector width: a key's score is one chain of fused multiply-adds over its dimensions (lanes are
keys), an output dimension is one chain over keys (lanes are dimensions).  Knows nothing about pages, heads or threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""float32 values in a vector; LLVM splits it where registers are narrower."""

WIDE_ROWS = 8 if binding.get_host_cpu_features().get("avx512f", False) else 4
"""Most rows that one call of `dot_keys` or `add_values` keeps in registers: 32 of them on AVX-512, 16 elsewhere."""

_F32 = ir.FloatType()
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_INDICES = ir.VectorType(_I32, LANES)
_F32_BYTES = 4
_MANY_ROWS = 8
"""Rows from which on computing takes longer than loading, so that nothing need be fetched ahead."""

Emit = Callable[[Any, ir.IRBuilder, Any, Any], ir.Value]


def _element_bytes(kind: types.Array) -> int:
    return int(kind.dtype.bitwidth) // 8


def _at(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, step: ir.Value | int) -> ir.Value:
    """Address ``base + index * step``."""
    factor = ir.Constant(_I64, step) if isinstance(step, int) else step
    return builder.add(base, builder.mul(index, factor))


def _load(builder: ir.IRBuilder, address: ir.Value, result: ir.Type, align: int = _F32_BYTES) -> ir.Value:
    return builder.load(builder.inttoptr(address, result.as_pointer()), align=align)


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = _F32_BYTES) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def _widen(builder: ir.IRBuilder, bits: ir.Value, wide: ir.Type, result: ir.Type) -> ir.Value:
    """bfloat16 bits to float32, scalar or vector."""
    shift = ir.Constant(wide, 16) if isinstance(wide, ir.IntType) else ir.Constant(wide, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(bits, wide), shift), result)


def _load_vector(builder: ir.IRBuilder, kind: types.Array, address: ir.Value) -> ir.Value:
    """Sixteen stored elements as float32."""
    if _element_bytes(kind) == _F32_BYTES:
        return _load(builder, address, _VECTOR)
    return _widen(builder, _load(builder, address, ir.VectorType(_I16, LANES), align=2), _INDICES, _VECTOR)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_INDICES, [0] * LANES))


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    function_type = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.fma.v16f32"), [a, b, c])


def _loop(
    builder: ir.IRBuilder,
    count: ir.Value,
    start: list[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """Carry values through ``count`` (at least one) rounds of ``body(index, values)``."""
    before, block = builder.block, builder.append_basic_block("round")
    after = builder.append_basic_block("done")
    builder.branch(block)
    builder.position_at_end(block)
    index = builder.phi(_I64)
    carried = [builder.phi(value.type) for value in start]
    updated = body(index, list(carried))
    following = builder.add(index, ir.Constant(_I64, 1))
    for phi, first, update in zip([index, *carried], [ir.Constant(_I64, 0), *start], [following, *updated]):
        phi.add_incoming(first, before)
        phi.add_incoming(update, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), block, after)
    builder.position_at_end(after)
    return updated


@intrinsic
def load_element(typing_context, kind, address):  # type: ignore[no-untyped-def]
    """The stored element at an address, as float32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if _element_bytes(kind) == _F32_BYTES:
            return _load(builder, args[1], _F32)
        return _widen(builder, _load(builder, args[1], _I16, align=2), _I32, _F32)

    return types.float32(kind, types.intp), emit


@intrinsic
def store_element(typing_context, kind, address, value):  # type: ignore[no-untyped-def]
    """Store a float32 at an address, rounded to nearest even where elements are bfloat16 (NaN stays NaN)."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, address, value = args
        if _element_bytes(kind) != _F32_BYTES:
            value = _round_to_bf16(builder, value)
        _store(builder, value, address, align=2)
        return context.get_dummy_value()

    return types.void(kind, types.intp, types.float32), emit


def _round_to_bf16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    bits = builder.bitcast(value, _I32)
    high = builder.lshr(bits, ir.Constant(_I32, 16))
    half = builder.add(builder.and_(high, ir.Constant(_I32, 1)), ir.Constant(_I32, 0x7FFF))
    rounded = builder.lshr(builder.add(bits, half), ir.Constant(_I32, 16))
    quiet = builder.or_(high, ir.Constant(_I32, 0x40))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded), _I16)


def _prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for a cache line that will be read soon; an address that is nowhere does no harm."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    function_type = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    builder.call(function, [pointer, ir.Constant(_I32, 0), ir.Constant(_I32, 2), ir.Constant(_I32, 1)])


@intrinsic(prefer_literal=True)
def dot_keys(typing_context, kind, rows, q, q_step, keys, key_step, depth, out, out_step, ahead):  # type: ignore[no-untyped-def]
    """Scores of ``rows`` (a literal) queries against 16 keys that lie side by side.

    q: float32 [rows, depth], ``q_step`` bytes a row; keys: [depth, 16], ``key_step`` bytes a dimension;
    out: float32 [rows, 16], ``out_step`` bytes a row.  Each score is one fma chain over the depth.
    ``ahead``: how many bytes farther the keys lie that will be wanted next.
    """
    count = rows.literal_value

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, _, q, q_step, keys, key_step, depth, out, out_step, ahead = args
        q_rows = [_at(builder, q, ir.Constant(_I64, row), q_step) for row in range(count)]

        def body(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            offset = builder.mul(index, key_step)
            if count < _MANY_ROWS:
                _prefetch(builder, builder.add(keys, builder.add(ahead, offset)))
            key = _load_vector(builder, kind, builder.add(keys, offset))
            values = [_load(builder, _at(builder, row, index, _F32_BYTES), _F32) for row in q_rows]
            return [_fma(builder, key, _splat(builder, value), total) for value, total in zip(values, sums)]

        sums = _loop(builder, depth, [ir.Constant(_VECTOR, [0.0] * LANES)] * count, body)
        for row, total in enumerate(sums):
            _store(builder, total, _at(builder, out, ir.Constant(_I64, row), out_step))
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
        full = builder.udiv(vectors, ir.Constant(_I64, width))
        with builder.if_then(builder.icmp_signed(">", full, ir.Constant(_I64, 0))):
            _loop(
                builder, full, [], lambda index, _: _emit_values(builder, span, _scaled(builder, index, width), width)
            )
        done = _scaled(builder, full, width)
        with builder.if_then(builder.icmp_signed("<", done, vectors)):
            _emit_values(builder, span, done, 1)
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


def _scaled(builder: ir.IRBuilder, value: ir.Value, factor: int) -> ir.Value:
    return builder.mul(value, ir.Constant(_I64, factor))


def _emit_values(builder: ir.IRBuilder, span: _Span, first: ir.Value, width: int) -> list[ir.Value]:
    """All rows' sums over ``width`` vectors of dimensions from vector ``first`` on, kept in registers over the count."""
    vector_bytes = LANES * _element_bytes(span.kind)
    row_numbers = [ir.Constant(_I64, row) for row in range(span.rows)]
    weights = [_at(builder, span.p, row, span.p_step) for row in row_numbers]
    columns = [builder.add(first, ir.Constant(_I64, vector)) for vector in range(width)]
    places = [
        _at(builder, _at(builder, span.sums, row, span.sum_step), column, 64)
        for row in row_numbers
        for column in columns
    ]

    def body(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
        base = _at(builder, span.values, index, span.value_step)
        if span.rows < _MANY_ROWS:
            for column in columns:
                _prefetch(builder, builder.add(span.ahead, _at(builder, base, column, vector_bytes)))
        vectors = [_load_vector(builder, span.kind, _at(builder, base, column, vector_bytes)) for column in columns]
        spread = [_splat(builder, _load(builder, _at(builder, row, index, _F32_BYTES), _F32)) for row in weights]
        pairs = [(weight, vector) for weight in spread for vector in vectors]
        return [_fma(builder, vector, weight, total) for (weight, vector), total in zip(pairs, totals)]

    for place, total in zip(places, _loop(builder, span.count, [_load(builder, at, _VECTOR) for at in places], body)):
        _store(builder, total, place)
    return []


def _fold(builder: ir.IRBuilder, vector: ir.Value, join: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """Join the lanes of a vector pairwise, the upper half onto the lower, down to one."""
    half = LANES // 2
    while half:
        picks = ir.Constant(_INDICES, [(lane + half) % LANES for lane in range(LANES)])
        vector = join(vector, builder.shuffle_vector(vector, ir.Constant(_VECTOR, ir.Undefined), picks))
        half //= 2
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _reduce(start: float, join: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Emit:
    """Emitter of a reduction over ``blocks`` vectors from an address: lane by lane, then across lanes."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        address, blocks = args

        def body(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            return [join(builder, totals[0], _load(builder, _at(builder, address, index, 64), _VECTOR))]

        (total,) = _loop(builder, blocks, [ir.Constant(_VECTOR, [start] * LANES)], body)
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
