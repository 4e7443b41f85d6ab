"""The one module that speaks LLVM: numba intrinsics that compiled CPU code is built from.

`fma`, `bits_of` and `float_of` are scalar; a loop over them is widened by LLVM's vectoriser.  `multiply_tile` is the
inner product of `linear.py`: some rows of activations times one tile of weights.  Fused multiply-adds are always
written out as ``llvm.fma``, so that rounding never depends on what a compiler chose to contract.
Knows nothing about torch, threads or models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Channels of one vector: one AVX-512 register, or two of AVX2."""
TILE_CHANNELS = 32
"""Output channels whose weights lie together: two vectors."""

_LINE_BYTES = 64

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_F32S, _I32S, _I16S = (ir.VectorType(element, LANES) for element in (_F32, _I32, _I16))


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Call the LLVM intrinsic ``name``."""
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


@intrinsic
def fma(typing_context, a, b, c):  # type: ignore[no-untyped-def]
    """``a * b + c`` in float32 with one rounding; arguments of other types are cast to float32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _call(builder, "llvm.fma.f32", _F32, *args)

    return types.float32(types.float32, types.float32, types.float32), emit


@intrinsic
def bits_of(typing_context, x):  # type: ignore[no-untyped-def]
    """The 32 bits of a float32, as uint32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], _I32)

    return types.uint32(types.float32), emit


@intrinsic
def float_of(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 whose 32 bits are those of a uint32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), emit


def _pointer_intrinsic(element: types.Type) -> Any:
    """An intrinsic that takes an address (int64) as a C pointer, for ``numba.carray``."""

    @intrinsic
    def pointer(typing_context, address):  # type: ignore[no-untyped-def]
        def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), emit

    return pointer


uint16s_at = _pointer_intrinsic(types.uint16)
float32s_at = _pointer_intrinsic(types.float32)


class _Emitter:
    """Writes vector code at the place where an IR builder stands; addresses are 64-bit integers, offsets bytes."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def offset(self, address: ir.Value, index: ir.Value | int, stride_bytes: int = 1) -> ir.Value:
        """``address + index * stride_bytes``."""
        count = ir.Constant(_I64, index) if isinstance(index, int) else index
        return self.builder.add(address, self.builder.mul(count, ir.Constant(_I64, stride_bytes)))

    def load(self, address: ir.Value, kind: ir.Type, align: int) -> ir.Value:
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def store_lanes(self, value: ir.Value, address: ir.Value, count: ir.Value) -> None:
        """Store the first ``count`` lanes of a vector; none where it is not positive."""
        lanes = ir.Constant(_I32S, list(range(LANES)))
        mask = self.builder.icmp_signed("<", lanes, self.splat(self.builder.trunc(count, _I32)))
        name = f"llvm.masked.store.v{LANES}{value.type.element.intrinsic_name}.p0"
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        align = ir.Constant(_I32, 2)
        _call(self.builder, name, ir.VoidType(), value, pointer, align, mask)

    def splat(self, scalar: ir.Value) -> ir.Value:
        empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
        one = self.builder.insert_element(empty, scalar, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(one, empty, ir.Constant(_I32S, [0] * LANES))

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return _call(self.builder, f"llvm.fma.v{LANES}f32", _F32S, a, b, c)

    def prefetch(self, address: ir.Value) -> None:
        """Ask for a cache line that will be read soon, in the second-level cache."""
        read, second, data = ir.Constant(_I32, 0), ir.Constant(_I32, 2), ir.Constant(_I32, 1)
        pointer = self.builder.inttoptr(address, _I8.as_pointer())
        _call(self.builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, second, data)

    def count(
        self, stop: ir.Value, start: Sequence[ir.Value], body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]]
    ) -> list[ir.Value]:
        """A loop ``i = 0 .. stop - 1`` (at least once) that carries values; returns the last ones."""
        builder = self.builder
        before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(_I64)
        carried = [builder.phi(value.type) for value in start]
        following = body(index, list(carried))
        next_index = builder.add(index, ir.Constant(_I64, 1))
        for phi, first, next_ in zip([index, *carried], [ir.Constant(_I64, 0), *start], [next_index, *following]):
            phi.add_incoming(first, before)
            phi.add_incoming(next_, builder.block)
        builder.cbranch(builder.icmp_signed("<", next_index, stop), loop, after)
        builder.position_at_end(after)
        return following


class _TileKind(Protocol):
    """How weights lie in a tile, and how sums become results."""

    step_bytes: ClassVar[int]
    """Bytes of one input's weights."""
    out_bytes: ClassVar[int]

    @staticmethod
    def weights(emitter: _Emitter, address: ir.Value, vectors: Sequence[int]) -> list[ir.Value]:
        """The given vectors of one input's weights, as float32."""

    @staticmethod
    def rounded(emitter: _Emitter, sums: ir.Value) -> ir.Value:
        """Sums as they are stored."""


class _Float32Tile(_TileKind):
    """One input's weights: 32 float32 in the order of their channels."""

    step_bytes = 4 * TILE_CHANNELS
    out_bytes = 4

    @staticmethod
    def weights(emitter: _Emitter, address: ir.Value, vectors: Sequence[int]) -> list[ir.Value]:
        return [emitter.load(emitter.offset(address, 4 * LANES * v), _F32S, 64) for v in vectors]

    @staticmethod
    def rounded(emitter: _Emitter, sums: ir.Value) -> ir.Value:
        return sums


class _BFloat16Tile(_TileKind):
    """One input's weights: 16 words of two bfloat16, channel j in the low and j + 16 in the high half of word j."""

    step_bytes = 2 * TILE_CHANNELS
    out_bytes = 2

    @staticmethod
    def weights(emitter: _Emitter, address: ir.Value, vectors: Sequence[int]) -> list[ir.Value]:
        words, builder = emitter.load(address, _I32S, 64), emitter.builder
        low = builder.shl(words, ir.Constant(_I32S, [16] * LANES))
        high = builder.and_(words, ir.Constant(_I32S, [0xFFFF0000] * LANES))
        return [builder.bitcast((low, high)[v], _F32S) for v in vectors]

    @staticmethod
    def rounded(emitter: _Emitter, sums: ir.Value) -> ir.Value:
        """Nearest bfloat16, ties to even; NaN stays NaN.  The same as `math.store_bf16`."""
        builder = emitter.builder

        def splat(number: int) -> ir.Value:
            return ir.Constant(_I32S, [number] * LANES)

        bits = builder.bitcast(sums, _I32S)
        high = builder.lshr(bits, splat(16))
        nearest = builder.lshr(builder.add(bits, builder.add(splat(0x7FFF), builder.and_(high, splat(1)))), splat(16))
        is_nan = builder.fcmp_unordered("uno", sums, sums)
        return builder.trunc(builder.select(is_nan, builder.or_(high, splat(0x40)), nearest), _I16S)


_TILES: dict[int, type[_TileKind]] = {32: _Float32Tile, 16: _BFloat16Tile}


@dataclass(frozen=True, slots=True)
class _TileOperands:
    """The arguments of `multiply_tile` as IR values, in its order."""

    x: ir.Value
    x_stride: ir.Value
    tile: ir.Value
    ahead: ir.Value
    ahead_stride: ir.Value
    inputs: ir.Value
    bias: ir.Value
    out: ir.Value
    out_stride: ir.Value
    channels: ir.Value


def _emit_rows(emitter: _Emitter, kind: type[_TileKind], rows: int, vectors: Sequence[int], to: _TileOperands) -> None:
    """Products of exactly ``rows`` rows with some of the tile's vectors: one running sum a row and channel."""
    builder = emitter.builder
    x_rows = [emitter.offset(to.x, builder.mul(to.x_stride, ir.Constant(_I64, r)), 4) for r in range(rows)]

    def one_input(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        ahead = builder.add(to.ahead, builder.mul(to.ahead_stride, k))
        for line in range(0, kind.step_bytes, _LINE_BYTES):
            emitter.prefetch(emitter.offset(ahead, line))
        weights = kind.weights(emitter, emitter.offset(to.tile, k, kind.step_bytes), vectors)
        spread = [emitter.splat(emitter.load(emitter.offset(row, k, 4), _F32, 4)) for row in x_rows]
        pairs = [(x, w) for x in spread for w in weights]
        return [emitter.fma(x, w, s) for (x, w), s in zip(pairs, sums)]

    zero = ir.Constant(_F32S, [0.0] * LANES)
    sums = emitter.count(to.inputs, [zero] * (rows * len(vectors)), one_input)
    biases = [emitter.load(emitter.offset(to.bias, 4 * LANES * v), _F32S, 64) for v in vectors]
    for i, total in enumerate(sums):
        row, vector = divmod(i, len(vectors))
        lane = LANES * vectors[vector]
        result = kind.rounded(emitter, builder.fadd(total, biases[vector]))
        out_row = emitter.offset(to.out, builder.mul(to.out_stride, ir.Constant(_I64, row)), kind.out_bytes)
        left = builder.sub(to.channels, ir.Constant(_I64, lane))
        emitter.store_lanes(result, emitter.offset(out_row, lane * kind.out_bytes), left)


@intrinsic(prefer_literal=True)
def multiply_tile(  # type: ignore[no-untyped-def]
    typing_context,
    bits,
    max_rows,
    registers,
    rows,
    x,
    x_stride,
    tile,
    ahead,
    ahead_stride,
    inputs,
    bias,
    out,
    out_stride,
    channels,
):
    """Rows of activations times one tile of weights, plus bias: ``out[r, c] = sum over k of x[r, k] * w[c, k] + b[c]``.

    Every sum is one chain of fused multiply-adds over k = 0, 1, ... that begins at zero, and the bias is added last:
    its bits do not depend on ``rows``, ``max_rows`` or ``registers``.  Both vectors of the tile are taken in one pass if
    their sums, weights and an input fit the registers, else one after the other.

    Args (the first three are literals, the rest 64-bit integers, addresses among them):
        bits: 32 or 16, of a weight and of an output: float32 or bfloat16.
        max_rows: most rows of one call.
        registers: 16-lane vectors that the processor can hold.
        rows: 1 to ``max_rows``.
        x: float32, rows ``x_stride`` elements apart.
        tile: [inputs, 32], 64-byte aligned, as `linear.py` packs it.
        ahead: what to prefetch at the first input, and ``ahead_stride`` bytes further at each next one; as many bytes
            as an input's weights.  Never read, so it may be any address.
        bias: float32 [32], 64-byte aligned.
        out: rows ``out_stride`` elements apart; only the first ``channels`` of the tile are written.
    """
    literals = (bits, max_rows, registers)
    if not all(isinstance(value, types.IntegerLiteral) for value in literals):
        return None
    kind, most, held = _TILES[bits.literal_value], max_rows.literal_value, registers.literal_value

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, count, operands = _Emitter(builder), args[3], _TileOperands(*args[4:])
        done = builder.append_basic_block("done")
        choice = builder.switch(count, done)
        for n in range(1, most + 1):
            block = builder.append_basic_block(f"rows{n}")
            choice.add_case(ir.Constant(_I64, n), block)
            builder.position_at_end(block)
            for vectors in ((0, 1),) if 2 * n + 3 <= held else ((0,), (1,)):
                _emit_rows(emitter, kind, n, vectors, operands)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*literals, *[types.int64] * 11), emit
