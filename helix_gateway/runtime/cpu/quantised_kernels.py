"""The inner product of quantised linear layers as LLVM vector code: rows of int8 activations times one tile of weights.

A vector holds four inputs of 16 output channels, so that lanes are channels and no sum runs across them; a tile has 32
channels.  (Where registers are shorter, a half of it is computed at a time: `_Vectors`.)  Inputs come in groups of 32
(`quantised_rows.py`), padded to whole ones.  A tile is multiplied in turns, of one group or of two.  Three formats of
weights, for each turn of a tile:

- `INT8`, ``w = d * q`` (GGUF's Q8_0): [2 vectors][8][16 channels][4] bytes of ``q + 128``, then 32 float16 ``d``.
- `INT4`, ``w = d * q + m`` with q in 0 .. 15 (GGUF's Q4_1, and Q4_0 with ``m = -8 d``): [2 vectors][4][16 channels][4]
  bytes, inputs 4 v + byte in the low and 16 + 4 v + byte in the high half of those of vector v, then 32 float16 ``d`` and
  32 ``m``.
- `INT8_CHANNELS`, ``w = d * q`` with one d for all of a channel: [2 vectors][16][16 channels][4] bytes of ``q + 128`` for
  each two groups, whose activations share a scale too, and 32 float32 ``d`` behind the last.

The products of what shares its scales are summed as integers, exactly; those sums are added up as float32 in their order,
each by fused multiply-adds.  Hence a row's result has the same bits on every processor and in every batch.  Knows nothing
about models.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from helix_gateway.runtime.cpu.dot_products import DOT_PRODUCTS, DotProducts
from helix_gateway.runtime.cpu.emitter import (
    F32,
    F32_BYTES,
    I16,
    I32,
    I64,
    LANES,
    VECTOR_BYTES,
    Emitter,
    constant,
)
from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS

FORMATS = INT8, INT4, INT8_CHANNELS = range(3)
"""Of weights."""
GROUP_INPUTS = 32
"""Inputs of a group."""
JOINED_GROUPS = 2
"""Groups of activations that share a scale before `INT8_CHANNELS`."""
GROUP_FIELDS = 3
"""Numbers of four bytes beside a group's int8 of a row: scale, start (-128 times their sum), and scale times sum."""

_LINE_BYTES = 64
_HALF_BYTES = 2
_NIBBLES = 0x0F0F0F0F


@dataclass(frozen=True, slots=True)
class _Operands:
    """The arguments of `multiply_quantised_tile` as IR values, in its order."""

    x: ir.Value
    fields: ir.Value
    stride: ir.Value
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
    """Some quantised rows of those that lie together, in one turn; all of a row's numbers are at fixed places from it."""

    emitter: Emitter
    count: int
    inputs_at: ir.Value
    """Where the first row's numbers of the turn begin."""
    fields_at: tuple[ir.Value, ...]
    """Where each field of the first row's is."""
    together: int
    """Groups of the turn."""

    def inputs(self, row: int, first: int) -> ir.Value:
        """Four inputs of the turn from a place on, as one int32."""
        place = row * self.together * GROUP_INPUTS + first
        return self.emitter.load(self.emitter.offset(self.inputs_at, place), I32)

    def _field(self, row: int, field: int, kind: ir.Type) -> ir.Value:
        return self.emitter.load(self.emitter.offset(self.fields_at[field], F32_BYTES * row), kind)

    def scale(self, row: int) -> ir.Value:
        """What one step of the turn's numbers is worth, float32."""
        return self._field(row, 0, F32)

    def start(self, row: int) -> ir.Value:
        """-128 times the sum of the turn's numbers, int32."""
        return self._field(row, 1, I32)

    def worth(self, row: int) -> ir.Value:
        """What the turn's numbers are worth together, float32."""
        return self._field(row, 2, F32)


@dataclass(frozen=True, slots=True)
class _Vectors:
    """Some vectors, one after another, of a tile's channels; they are as wide as the emitter's."""

    emitter: Emitter
    numbers: range

    def load(self, element: ir.Type, at: ir.Value, lane_bytes: int) -> list[ir.Value]:
        """All of them, of those that lie side by side from ``at`` on."""
        kind, step = self.emitter.vector(element), lane_bytes * self.emitter.lanes
        return [self.emitter.load(self.emitter.offset(at, number, step), kind, step) for number in self.numbers]

    def words(self, at: ir.Value, step: int) -> list[ir.Value]:
        """Four bytes of each channel: those of 16 lie side by side, those of the next 16 ``step`` bytes further."""
        kind, size, parts = self.emitter.vector(I32), F32_BYTES * self.emitter.lanes, LANES // self.emitter.lanes
        places = [number // parts * step + number % parts * size for number in self.numbers]
        return [self.emitter.load(self.emitter.offset(at, place), kind, size) for place in places]


class _Format(ABC):
    """How a tile is multiplied, a turn after the other."""

    groups: ClassVar[int] = 1
    """Of a turn: those that share their scales."""
    turn_bytes: ClassVar[int]
    """Of a turn's weights."""
    tail_bytes: ClassVar[int] = 0
    """Behind those of the last turn."""

    @staticmethod
    @abstractmethod
    def add_turn(
        dot: DotProducts, rows: _Rows, at: ir.Value, vectors: _Vectors, sums: list[ir.Value]
    ) -> list[ir.Value]:
        """Sums after one turn more; ``at``: where its weights lie."""

    @staticmethod
    def finished(vectors: _Vectors, tail: ir.Value, totals: list[ir.Value], biases: list[ir.Value]) -> list[ir.Value]:
        """What a row's sums over all turns come to; ``tail``: where the last turn's weights end."""
        return [vectors.emitter.builder.fadd(total, bias) for total, bias in zip(totals, biases)]


def _halves(vectors: _Vectors, at: ir.Value, byte: int) -> list[ir.Value]:
    """A float16 of every channel, as float32."""
    emitter = vectors.emitter
    return [emitter.from_half(bits) for bits in vectors.load(I16, emitter.offset(at, byte), _HALF_BYTES)]


def _add_scaled(rows: _Rows, parts: list[ir.Value], scales: list[ir.Value], sums: list[ir.Value]) -> list[ir.Value]:
    """Integer sums of a turn times the scales of activations and weights, added to the float32 sums."""
    emitter, following = rows.emitter, []
    for place, (part, total) in enumerate(zip(parts, sums)):
        row, vector = divmod(place, len(scales))
        numbers = emitter.builder.sitofp(part, emitter.vector(F32))
        worth = emitter.builder.fmul(numbers, emitter.splat(rows.scale(row)))
        following.append(emitter.fma(scales[vector], worth, total))
    return following


def _byte_products(dot: DotProducts, rows: _Rows, at: ir.Value, vectors: _Vectors) -> list[ir.Value]:
    """Sums of a turn's products, int32, each row's vectors side by side."""
    emitter, numbers, quads = rows.emitter, range(rows.count), rows.together * GROUP_INPUTS // 4
    starts = [dot.signed_start(emitter, rows.start(row)) for row in numbers]
    parts = [start for start in starts for _ in vectors.numbers]
    for quad in range(quads):
        stored = vectors.words(emitter.offset(at, VECTOR_BYTES * quad), VECTOR_BYTES * quads)
        weights = [dot.signed_weights(emitter, vector) for vector in stored]
        fours = [rows.inputs(row, 4 * quad) for row in numbers]
        pairs = [(x, w) for x in fours for w in weights]
        parts = [dot.add_signed(emitter, part, w, x) for (x, w), part in zip(pairs, parts)]
    return parts


class _Int8(_Format):
    scales_at = GROUP_INPUTS * TILE_CHANNELS
    turn_bytes = scales_at + 2 * TILE_CHANNELS

    @staticmethod
    def add_turn(
        dot: DotProducts, rows: _Rows, at: ir.Value, vectors: _Vectors, sums: list[ir.Value]
    ) -> list[ir.Value]:
        parts = _byte_products(dot, rows, at, vectors)
        return _add_scaled(rows, parts, _halves(vectors, at, _Int8.scales_at), sums)


class _Int8Channels(_Format):
    groups = JOINED_GROUPS
    turn_bytes = groups * GROUP_INPUTS * TILE_CHANNELS
    tail_bytes = F32_BYTES * TILE_CHANNELS

    @staticmethod
    def add_turn(
        dot: DotProducts, rows: _Rows, at: ir.Value, vectors: _Vectors, sums: list[ir.Value]
    ) -> list[ir.Value]:
        emitter, parts = rows.emitter, _byte_products(dot, rows, at, vectors)
        scales = [emitter.splat(rows.scale(row)) for row in range(rows.count) for _ in vectors.numbers]
        numbers = [emitter.builder.sitofp(part, emitter.vector(F32)) for part in parts]
        return [emitter.fma(scale, number, total) for scale, number, total in zip(scales, numbers, sums)]

    @staticmethod
    def finished(vectors: _Vectors, tail: ir.Value, totals: list[ir.Value], biases: list[ir.Value]) -> list[ir.Value]:
        scales = vectors.load(F32, tail, F32_BYTES)
        return [vectors.emitter.fma(scale, total, bias) for scale, total, bias in zip(scales, totals, biases)]


class _Int4(_Format):
    scales_at = GROUP_INPUTS * TILE_CHANNELS // 2
    minima_at = scales_at + 2 * TILE_CHANNELS
    turn_bytes = minima_at + 2 * TILE_CHANNELS

    @staticmethod
    def add_turn(
        dot: DotProducts, rows: _Rows, at: ir.Value, vectors: _Vectors, sums: list[ir.Value]
    ) -> list[ir.Value]:
        emitter, parts = rows.emitter, _nibble_products(dot, rows, at, vectors)
        scales, minima = (_halves(vectors, at, byte) for byte in (_Int4.scales_at, _Int4.minima_at))
        worths = [emitter.splat(rows.worth(row)) for row in range(rows.count)]
        pairs = [(worth, minimum) for worth in worths for minimum in minima]
        sums = [emitter.fma(minimum, worth, total) for (worth, minimum), total in zip(pairs, sums)]
        return _add_scaled(rows, parts, scales, sums)


def _nibble_products(dot: DotProducts, rows: _Rows, at: ir.Value, vectors: _Vectors) -> list[ir.Value]:
    """Sums of one group's products, int32, each row's vectors side by side."""
    emitter, builder, numbers = rows.emitter, rows.emitter.builder, range(rows.count)
    parts, words = [dot.small_start(emitter)] * (rows.count * len(vectors.numbers)), emitter.vector(I32)
    quads = GROUP_INPUTS // 8
    for quad in range(quads):
        stored = vectors.words(emitter.offset(at, VECTOR_BYTES * quad), VECTOR_BYTES * quads)
        for shift in (0, 4):
            weights = [
                builder.and_(builder.lshr(vector, constant(words, shift)), constant(words, _NIBBLES))
                for vector in stored
            ]
            inputs = [rows.inputs(row, 4 * quad + quads * shift) for row in numbers]
            pairs = [(x, w) for x in inputs for w in weights]
            parts = [dot.add_small(emitter, part, w, x) for (x, w), part in zip(pairs, parts)]
    return [dot.small_sums(emitter, part) for part in parts]


_KINDS: dict[int, type[_Format]] = {INT8: _Int8, INT4: _Int4, INT8_CHANNELS: _Int8Channels}


def groups_together(format_: int) -> int:
    """Groups that share their scales; a matrix has whole numbers of such."""
    return _KINDS[format_].groups


def turn_bytes(format_: int) -> int:
    """Bytes of a tile for such groups."""
    return _KINDS[format_].turn_bytes


def tile_bytes(format_: int, groups: int) -> int:
    """Bytes of a tile of so many groups."""
    kind = _KINDS[format_]
    return groups // kind.groups * kind.turn_bytes + kind.tail_bytes


def num_passes(rows: int, dot: DotProducts) -> int:
    """How often so many rows, up to ``dot.sums``, go over a tile: as rarely as their sums allow."""
    passes, vectors = 1, TILE_CHANNELS // dot.lanes
    while rows * vectors > passes * dot.sums and passes < vectors:
        passes *= 2
    return passes


def _emit_pass(
    kind: type[_Format], dot: DotProducts, rows: int, to: _Operands, vectors: _Vectors, lines: range
) -> None:
    """Products of some rows with some vectors of the tile; ``lines``: which bytes of a turn are asked for ahead."""
    emitter, builder, width = vectors.emitter, vectors.emitter.builder, len(vectors.numbers)
    turns = builder.udiv(to.groups, ir.Constant(I64, kind.groups))
    field_bytes = builder.mul(builder.mul(to.groups, to.stride), ir.Constant(I64, F32_BYTES))

    def one_turn(turn: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        ahead = emitter.offset(to.ahead, turn, to.ahead_stride)
        for line in lines:
            emitter.prefetch(emitter.offset(ahead, line))
        before = builder.mul(builder.mul(turn, ir.Constant(I64, kind.groups)), to.stride)
        first = emitter.offset(to.fields, before, F32_BYTES)
        fields = tuple(emitter.offset(first, field_bytes, field) for field in range(GROUP_FIELDS))
        together = _Rows(emitter, rows, emitter.offset(to.x, before, GROUP_INPUTS), fields, kind.groups)
        return kind.add_turn(dot, together, emitter.offset(to.tile, turn, kind.turn_bytes), vectors, sums)

    totals = emitter.count(turns, [constant(emitter.vector(F32), 0.0)] * (rows * width), one_turn)
    tail, biases = emitter.offset(to.tile, turns, kind.turn_bytes), vectors.load(F32, to.bias, F32_BYTES)
    for row in range(rows):
        out_row = emitter.offset(to.out, builder.mul(to.out_stride, ir.Constant(I64, row)), F32_BYTES)
        results = kind.finished(vectors, tail, totals[row * width : (row + 1) * width], biases)
        for number, result in zip(vectors.numbers, results):
            lane = emitter.lanes * number
            left = builder.sub(to.channels, ir.Constant(I64, lane))
            emitter.store_lanes(result, emitter.offset(out_row, F32_BYTES * lane), left)


@intrinsic(prefer_literal=True)
def multiply_quantised_tile(  # type: ignore[no-untyped-def]
    typing_context,
    format_,
    dot,
    few_rows,
    many_rows,
    rows,
    x,
    fields,
    stride,
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
        format_: `INT8`, `INT4` or `INT8_CHANNELS`.
        dot: place in `DOT_PRODUCTS` of the instructions to be used.
        few_rows: each number of rows up to it is code of its own.
        many_rows: one number more; may be ``few_rows``.
        rows: 1 to ``few_rows``, or ``many_rows``.
        x: numbers of the first of these rows, as `quantised_rows.py` lays rows out.
        fields: its first field.
        stride: how many rows lie together.
        tile: see above, 64-byte aligned.
        ahead: what to prefetch with the first turn, and ``ahead_stride`` bytes further with each next one.
            Never read, so it may be any address.
        groups: of 32 inputs, a multiple of `groups_together`.
        bias: float32 [32], 64-byte aligned.
        out: float32 rows ``out_stride`` elements apart; only the first ``channels`` of the tile are written.
    """
    literals = (format_, dot, few_rows, many_rows)
    if not all(isinstance(value, types.IntegerLiteral) for value in literals):
        return None
    kind, products = _KINDS[format_.literal_value], DOT_PRODUCTS[dot.literal_value]
    numbers = sorted({*range(1, few_rows.literal_value + 1), many_rows.literal_value})

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, operands = Emitter(builder, products.lanes), _Operands(*args[5:])

        def rows(n: int) -> None:
            passes = num_passes(n, products)
            width = TILE_CHANNELS // products.lanes // passes
            for number in range(passes):
                vectors = _Vectors(emitter, range(number * width, (number + 1) * width))
                lines = range(number * _LINE_BYTES, kind.turn_bytes, passes * _LINE_BYTES)
                _emit_pass(kind, products, n, operands, vectors, lines)

        emitter.for_each_number(args[4], numbers, rows)
        return context.get_dummy_value()

    return types.void(*literals, *[types.intp] * 12), emit
