"""The inner product of quantised linear layers as LLVM vector code: rows of int8 activations times one tile of weights.

A vector holds four inputs of 16 output channels, so that lanes are channels and no sum runs across them; a tile has 32
channels.  Inputs come in groups of 32, of weights and of activations alike (`quantised_rows.py`), padded to whole ones.
Two formats of weights, for each group of a tile:

- `INT8`, ``w = d * q`` (GGUF's Q8_0): [2 vectors][8][16 channels][4] bytes of ``q + 128``, then 32 float16 ``d``.
- `INT4`, ``w = d * q + m`` with q in 0 .. 15 (GGUF's Q4_1, and Q4_0 with ``m = -8 d``): [2 vectors][4][16 channels][4]
  bytes, inputs 4 v + byte in the low and 16 + 4 v + byte in the high half of those of vector v, then 32 float16 ``d`` and
  32 ``m``.

The products of a group are summed as integers, exactly; groups are added up as float32 in their order, each by fused
multiply-adds.  Hence a row's result has the same bits on every processor and in every batch.  Knows nothing about models.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from helix_gateway.runtime.cpu.dot_products import DOT_PRODUCTS, DotProducts
from helix_gateway.runtime.cpu.emitter import (
    F32,
    F32_BYTES,
    F32S,
    I16S,
    I32,
    I32S,
    I64,
    LANES,
    VECTOR_BYTES,
    Emitter,
    constant,
)
from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS

INT8, INT4 = range(2)
"""The formats of weights."""
GROUP_INPUTS = 32
"""Inputs of a group."""
GROUP_FIELDS = 3
"""Numbers of four bytes beside a group's int8 in a quantised row: scale, sum, and their product."""

_LINE_BYTES = 64
_HALVES_BYTES = 2 * LANES
_NIBBLES = 0x0F0F0F0F


@dataclass(frozen=True, slots=True)
class _Operands:
    """The arguments of `multiply_quantised_tile` as IR values, in its order."""

    x: ir.Value
    x_stride: ir.Value
    tile: ir.Value
    ahead: ir.Value
    ahead_stride: ir.Value
    groups: ir.Value
    bias: ir.Value
    out: ir.Value
    out_stride: ir.Value
    channels: ir.Value


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some quantised rows, and where the parts of each lie."""

    emitter: Emitter
    addresses: list[ir.Value]
    groups: ir.Value

    def inputs(self, row: int, first: ir.Value) -> ir.Value:
        """Four inputs from a place on, as one int32."""
        return self.emitter.load(self.emitter.offset(self.addresses[row], first), I32)

    def _field(self, row: int, field: int, group: ir.Value, kind: ir.Type) -> ir.Value:
        fields = self.emitter.offset(self.addresses[row], self.groups, GROUP_INPUTS + F32_BYTES * field)
        return self.emitter.load(self.emitter.offset(fields, group, F32_BYTES), kind)

    def scale(self, row: int, group: ir.Value) -> ir.Value:
        """What one step of a group's numbers is worth, float32."""
        return self._field(row, 0, group, F32)

    def sum(self, row: int, group: ir.Value) -> ir.Value:
        """The sum of a group's numbers, int32."""
        return self._field(row, 1, group, I32)

    def worth(self, row: int, group: ir.Value) -> ir.Value:
        """What a group's numbers are worth together, float32."""
        return self._field(row, 2, group, F32)


class _Format(ABC):
    """How one group of a tile is multiplied; vectors are those of the tile that are wanted, each row's side by side."""

    group_bytes: ClassVar[int]

    @staticmethod
    @abstractmethod
    def add_group(
        dot: DotProducts, rows: _Rows, at: ir.Value, group: ir.Value, vectors: Sequence[int], sums: list[ir.Value]
    ) -> list[ir.Value]:
        """Sums after one group more; ``at``: where its weights lie."""


def _halves_at(emitter: Emitter, address: ir.Value, byte: int) -> ir.Value:
    """Sixteen float16 as float32."""
    return emitter.from_half(emitter.load(emitter.offset(address, byte), I16S, _HALVES_BYTES))


def _add_scaled(
    rows: _Rows, group: ir.Value, parts: list[ir.Value], scales: list[ir.Value], sums: list[ir.Value]
) -> list[ir.Value]:
    """Integer sums of a group times the scales of activations and weights, added to the float32 sums."""
    emitter, following = rows.emitter, []
    for place, (part, total) in enumerate(zip(parts, sums)):
        row, vector = divmod(place, len(scales))
        worth = emitter.builder.fmul(emitter.builder.sitofp(part, F32S), emitter.splat(rows.scale(row, group)))
        following.append(emitter.fma(scales[vector], worth, total))
    return following


class _Int8(_Format):
    scales_at = GROUP_INPUTS * TILE_CHANNELS
    group_bytes = scales_at + 2 * TILE_CHANNELS

    @staticmethod
    def add_group(
        dot: DotProducts, rows: _Rows, at: ir.Value, group: ir.Value, vectors: Sequence[int], sums: list[ir.Value]
    ) -> list[ir.Value]:
        emitter, builder = rows.emitter, rows.emitter.builder
        first, numbers = builder.mul(group, ir.Constant(I64, GROUP_INPUTS)), range(len(rows.addresses))
        starts = [dot.signed_start(emitter, rows.sum(row, group)) for row in numbers]
        parts = [start for start in starts for _ in vectors]
        for quad in range(GROUP_INPUTS // 4):
            places = [VECTOR_BYTES * (GROUP_INPUTS // 4 * v + quad) for v in vectors]
            stored = [emitter.load(emitter.offset(at, place), I32S, _LINE_BYTES) for place in places]
            weights = [dot.signed_weights(emitter, vector) for vector in stored]
            inputs = [rows.inputs(row, builder.add(first, ir.Constant(I64, 4 * quad))) for row in numbers]
            pairs = [(x, w) for x in inputs for w in weights]
            parts = [dot.add_signed(emitter, part, w, x) for (x, w), part in zip(pairs, parts)]
        scales = [_halves_at(emitter, at, _Int8.scales_at + _HALVES_BYTES * v) for v in vectors]
        return _add_scaled(rows, group, parts, scales, sums)


class _Int4(_Format):
    scales_at = GROUP_INPUTS * TILE_CHANNELS // 2
    minima_at = scales_at + 2 * TILE_CHANNELS
    group_bytes = minima_at + 2 * TILE_CHANNELS

    @staticmethod
    def add_group(
        dot: DotProducts, rows: _Rows, at: ir.Value, group: ir.Value, vectors: Sequence[int], sums: list[ir.Value]
    ) -> list[ir.Value]:
        emitter, builder = rows.emitter, rows.emitter.builder
        parts = _nibble_products(dot, rows, at, builder.mul(group, ir.Constant(I64, GROUP_INPUTS)), vectors)
        scales = [_halves_at(emitter, at, _Int4.scales_at + _HALVES_BYTES * v) for v in vectors]
        minima = [_halves_at(emitter, at, _Int4.minima_at + _HALVES_BYTES * v) for v in vectors]
        worths = [emitter.splat(rows.worth(row, group)) for row in range(len(rows.addresses))]
        pairs = [(worth, minimum) for worth in worths for minimum in minima]
        sums = [emitter.fma(minimum, worth, total) for (worth, minimum), total in zip(pairs, sums)]
        return _add_scaled(rows, group, parts, scales, sums)


def _nibble_products(
    dot: DotProducts, rows: _Rows, at: ir.Value, first: ir.Value, vectors: Sequence[int]
) -> list[ir.Value]:
    """Sums of one group's products, int32, each row's vectors side by side; ``first``: the group's first input."""
    emitter, builder, numbers = rows.emitter, rows.emitter.builder, range(len(rows.addresses))
    parts = [dot.small_start()] * (len(rows.addresses) * len(vectors))
    for quad in range(GROUP_INPUTS // 8):
        places = [VECTOR_BYTES * (GROUP_INPUTS // 8 * v + quad) for v in vectors]
        stored = [emitter.load(emitter.offset(at, place), I32S, _LINE_BYTES) for place in places]
        for shift in (0, 4):
            weights = [
                builder.and_(builder.lshr(vector, constant(I32S, shift)), constant(I32S, _NIBBLES)) for vector in stored
            ]
            place = ir.Constant(I64, 4 * quad + GROUP_INPUTS // 8 * shift)
            inputs = [rows.inputs(row, builder.add(first, place)) for row in numbers]
            pairs = [(x, w) for x in inputs for w in weights]
            parts = [dot.add_small(emitter, part, w, x) for (x, w), part in zip(pairs, parts)]
    return [dot.small_sums(emitter, part) for part in parts]


_FORMATS: dict[int, type[_Format]] = {INT8: _Int8, INT4: _Int4}


def group_bytes(format_: int) -> int:
    """Bytes of one group of a tile."""
    return _FORMATS[format_].group_bytes


def rows_of_one_pass(registers: int) -> int:
    """Most rows that take both vectors of a tile at once: two sums of each, weights and scales fit the registers."""
    return (registers - 6) // 4


def _passes(rows: int, registers: int) -> tuple[tuple[int, ...], ...]:
    return ((0, 1),) if rows <= rows_of_one_pass(registers) else ((0,), (1,))


def _emit_pass(
    kind: type[_Format], dot: DotProducts, rows: _Rows, to: _Operands, lines: range, vectors: Sequence[int]
) -> None:
    """Products of some rows with some vectors of the tile; ``lines``: which bytes of a group are asked for ahead."""
    emitter, builder = rows.emitter, rows.emitter.builder

    def one_group(group: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        ahead = emitter.offset(to.ahead, group, to.ahead_stride)
        for line in lines:
            emitter.prefetch(emitter.offset(ahead, line))
        at = emitter.offset(to.tile, group, kind.group_bytes)
        return kind.add_group(dot, rows, at, group, vectors, sums)

    start = [constant(F32S, 0.0)] * (len(rows.addresses) * len(vectors))
    for place, total in enumerate(emitter.count(to.groups, start, one_group)):
        row, vector = place // len(vectors), vectors[place % len(vectors)]
        bias = emitter.load(emitter.offset(to.bias, VECTOR_BYTES * vector), F32S, _LINE_BYTES)
        out_row = emitter.offset(to.out, builder.mul(to.out_stride, ir.Constant(I64, row)), F32_BYTES)
        left = builder.sub(to.channels, ir.Constant(I64, LANES * vector))
        emitter.store_lanes(builder.fadd(total, bias), emitter.offset(out_row, VECTOR_BYTES * vector), left)


@intrinsic(prefer_literal=True)
def multiply_quantised_tile(  # type: ignore[no-untyped-def]
    typing_context,
    format_,
    dot,
    least_rows,
    most_rows,
    rows,
    x,
    x_stride,
    tile,
    ahead,
    ahead_stride,
    groups,
    bias,
    out,
    out_stride,
    channels,
):
    """Some quantised rows times one tile of weights, plus bias, as float32.

    Args (the first four are literals, the rest 64-bit integers, addresses among them):
        format_: `INT8` or `INT4`.
        dot: place in `DOT_PRODUCTS` of the instructions to be used.
        least_rows: fewest rows of one call; each number up to `most_rows` is code of its own.
        most_rows: most rows of one call.
        rows: ``least_rows`` to ``most_rows``.
        x: quantised rows, ``x_stride`` bytes apart.
        tile: see above, 64-byte aligned.
        ahead: what to prefetch with the first group, and ``ahead_stride`` bytes further with each next one.
            Never read, so it may be any address.
        groups: of 32 inputs.
        bias: float32 [32], 64-byte aligned.
        out: float32 rows ``out_stride`` elements apart; only the first ``channels`` of the tile are written.
    """
    literals = (format_, dot, least_rows, most_rows)
    if not all(isinstance(value, types.IntegerLiteral) for value in literals):
        return None
    kind, products = _FORMATS[format_.literal_value], DOT_PRODUCTS[dot.literal_value]
    numbers = range(least_rows.literal_value, most_rows.literal_value + 1)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, operands = Emitter(builder), _Operands(*args[5:])

        def rows(n: int) -> None:
            records = [
                emitter.offset(operands.x, builder.mul(operands.x_stride, ir.Constant(I64, r))) for r in range(n)
            ]
            passes = _passes(n, products.registers)
            for number, vectors in enumerate(passes):
                lines = range(number * _LINE_BYTES, kind.group_bytes, len(passes) * _LINE_BYTES)
                _emit_pass(kind, products, _Rows(emitter, records, operands.groups), operands, lines, vectors)

        emitter.for_each_number(args[4], numbers, rows)
        return context.get_dummy_value()

    return types.void(*literals, *[types.intp] * 11), emit
