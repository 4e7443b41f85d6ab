"""Micro-kernels as numba intrinsics: scalar bits and fused multiply-adds, and the inner product of linear layers.

`fma`, `bits_of` and `float_of` are scalar; a loop over them is widened by LLVM's vectoriser.  `multiply_tile` is the
inner product of `linear.py`: some rows of activations times one tile of weights.  Attention's are in
`attention_kernels.py`.  Knows nothing about torch, threads or models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from helix_gateway.runtime.cpu.emitter import (
    F32,
    F32_BYTES,
    F32S,
    I32,
    I32S,
    I64,
    LANES,
    VECTOR_BYTES,
    Emitter,
    call,
    constant,
)

TILE_CHANNELS = 2 * LANES
"""Output channels whose weights lie together: two vectors."""

_LINE_BYTES = 64


@intrinsic
def fma(typing_context, a, b, c):  # type: ignore[no-untyped-def]
    """``a * b + c`` in float32 with one rounding; arguments of other types are cast to float32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return call(builder, "llvm.fma.f32", F32, *args)

    return types.float32(types.float32, types.float32, types.float32), emit


@intrinsic
def bits_of(typing_context, x):  # type: ignore[no-untyped-def]
    """The 32 bits of a float32, as uint32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), emit


@intrinsic
def float_of(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 whose 32 bits are those of a uint32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], F32)

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


class _TileKind(Protocol):
    """How weights lie in a tile, and how sums become results."""

    step_bytes: ClassVar[int]
    """Bytes of one input's weights."""
    out_bytes: ClassVar[int]

    @staticmethod
    def weights(emitter: Emitter, address: ir.Value, vectors: Sequence[int]) -> list[ir.Value]:
        """The given vectors of one input's weights, as float32."""

    @staticmethod
    def stored(emitter: Emitter, sums: ir.Value) -> ir.Value:
        """Sums as they are stored."""


class _Float32Tile(_TileKind):
    """One input's weights: 32 float32 in the order of their channels."""

    step_bytes = 4 * TILE_CHANNELS
    out_bytes = 4

    @staticmethod
    def weights(emitter: Emitter, address: ir.Value, vectors: Sequence[int]) -> list[ir.Value]:
        return [emitter.load(emitter.offset(address, VECTOR_BYTES * v), F32S, _LINE_BYTES) for v in vectors]

    @staticmethod
    def stored(emitter: Emitter, sums: ir.Value) -> ir.Value:
        return sums


class _BFloat16Tile(_TileKind):
    """One input's weights: 16 words of two bfloat16, channel j in the low and j + 16 in the high half of word j."""

    step_bytes = 2 * TILE_CHANNELS
    out_bytes = 2

    @staticmethod
    def weights(emitter: Emitter, address: ir.Value, vectors: Sequence[int]) -> list[ir.Value]:
        words, builder = emitter.load(address, I32S, _LINE_BYTES), emitter.builder
        low = builder.shl(words, constant(I32S, 16))
        high = builder.and_(words, constant(I32S, 0xFFFF0000))
        return [builder.bitcast((low, high)[v], F32S) for v in vectors]

    @staticmethod
    def stored(emitter: Emitter, sums: ir.Value) -> ir.Value:
        return emitter.rounded(sums)


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


def _emit_rows(emitter: Emitter, kind: type[_TileKind], rows: int, vectors: Sequence[int], to: _TileOperands) -> None:
    """Products of exactly ``rows`` rows with some of the tile's vectors: one running sum a row and channel."""
    builder = emitter.builder
    x_rows = [emitter.offset(to.x, builder.mul(to.x_stride, ir.Constant(I64, r)), F32_BYTES) for r in range(rows)]

    def one_input(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        ahead = emitter.offset(to.ahead, k, to.ahead_stride)
        for line in range(0, kind.step_bytes, _LINE_BYTES):
            emitter.prefetch(emitter.offset(ahead, line))
        weights = kind.weights(emitter, emitter.offset(to.tile, k, kind.step_bytes), vectors)
        spread = [emitter.splat(emitter.load(emitter.offset(row, k, F32_BYTES), F32)) for row in x_rows]
        pairs = [(x, w) for x in spread for w in weights]
        return [emitter.fma(x, w, s) for (x, w), s in zip(pairs, sums)]

    sums = emitter.count(to.inputs, [constant(F32S, 0.0)] * (rows * len(vectors)), one_input)
    biases = [emitter.load(emitter.offset(to.bias, VECTOR_BYTES * v), F32S, _LINE_BYTES) for v in vectors]
    for i, total in enumerate(sums):
        row, vector = divmod(i, len(vectors))
        lane = LANES * vectors[vector]
        result = kind.stored(emitter, builder.fadd(total, biases[vector]))
        out_row = emitter.offset(to.out, builder.mul(to.out_stride, ir.Constant(I64, row)), kind.out_bytes)
        left = builder.sub(to.channels, ir.Constant(I64, lane))
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
        emitter, operands = Emitter(builder), _TileOperands(*args[4:])

        def rows(n: int) -> None:
            for vectors in ((0, 1),) if 2 * n + 3 <= held else ((0,), (1,)):
                _emit_rows(emitter, kind, n, vectors, operands)

        emitter.for_each_number(args[3], range(1, most + 1), rows)
        return context.get_dummy_value()

    return types.void(*literals, *[types.int64] * 11), emit
