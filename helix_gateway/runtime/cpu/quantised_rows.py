"""Rows of float32 become int8 in groups of 32 with a scale each, laid out as quantised products take them.

Rows of one product lie together: for each group the 32 int8 of every row, one row after another (zeros behind the last
input), then three fields in the same order, four bytes of each group and row: a float32, what one step of the group's
numbers is worth (its largest magnitude over 127); the int32 sum of its numbers times -128; the product of scale and sum.
So a kernel finds any of its rows at a fixed place from the first one, whatever the width.  Before weights of one scale a
channel two and two groups are joined: 64 int8 of a row side by side, with one scale, and the first of both has the fields.
Rows of float32 are padded with zeros to whole groups.  What becomes of a row depends on that row alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from helix_gateway.core.inner_functions import INNER
from helix_gateway.runtime.cpu.emitter import (
    F32,
    F32_BYTES,
    F32S,
    I8S,
    I32,
    I32S,
    I64,
    LANES,
    VECTOR_BYTES,
    Emitter,
    call,
    constant,
)
from helix_gateway.runtime.cpu.integer_dot import BYTE_OFFSET
from helix_gateway.runtime.cpu.quantised_kernels import GROUP_FIELDS, GROUP_INPUTS, JOINED_GROUPS
from helix_gateway.runtime.cpu.vector_math import exponential

_LARGEST = 127.0
# A group whose numbers are all smaller than this becomes zeros: the inverse of its scale might not be finite.
_SMALLEST = 1e-30
_ONE = np.float32(1.0)
# Twice the square root of 2 / pi, and 0.044715 of that.
_GELU_SLOPE = 1.5957691216057308
_GELU_CUBE = 0.044715 * _GELU_SLOPE


def num_groups(inputs: int) -> int:
    """Groups that so many inputs are padded to."""
    return -(-inputs // GROUP_INPUTS)


def rows_bytes(rows: int, groups: int) -> int:
    """Bytes of so many quantised rows."""
    return rows * groups * (GROUP_INPUTS + GROUP_FIELDS * F32_BYTES)


Load = Callable[[ir.Value], ir.Value]
"""The i-th 16 numbers of a row."""


def _greater(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _emit_group(emitter: Emitter, numbers: list[ir.Value], target: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Write the int8 of what shares a scale; returns that and their sum."""
    builder = emitter.builder
    sizes = [call(builder, f"llvm.fabs.v{LANES}f32", F32S, vector) for vector in numbers]
    top = emitter.folded(reduce(lambda a, b: _greater(builder, a, b), sizes), lambda a, b: _greater(builder, a, b))
    usable = builder.fcmp_ordered(">", top, ir.Constant(F32, _SMALLEST))
    top = builder.select(usable, top, ir.Constant(F32, _LARGEST))
    inverse, steps = emitter.splat(builder.fdiv(ir.Constant(F32, _LARGEST), top)), []
    for place, vector in enumerate(numbers):
        nearest = call(builder, f"llvm.rint.v{LANES}f32", F32S, builder.fmul(vector, inverse))
        steps.append(builder.fptosi(nearest, I32S))
        emitter.store(builder.trunc(steps[-1], I8S), emitter.offset(target, LANES * place), LANES)
    total = call(builder, f"llvm.vector.reduce.add.v{LANES}i32", I32, reduce(builder.add, steps))
    return builder.fdiv(top, ir.Constant(F32, _LARGEST)), total


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row goes, as IR values in the order in which intrinsics take them."""

    all: ir.Value
    """Address of the rows that lie together."""
    row: ir.Value
    rows: ir.Value
    groups: ir.Value


def _emit_groups(emitter: Emitter, load: Load, to: _Place, together: int) -> None:
    """Write a row of which so many groups share a scale."""
    builder = emitter.builder
    pairs = builder.mul(to.groups, to.rows)
    fields = [emitter.offset(to.all, pairs, GROUP_INPUTS + F32_BYTES * field) for field in range(GROUP_FIELDS)]

    def one_turn(turn: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        group = builder.mul(turn, ir.Constant(I64, together))
        first, before = builder.mul(group, ir.Constant(I64, 2)), builder.mul(group, to.rows)
        numbers = [load(builder.add(first, ir.Constant(I64, half))) for half in range(2 * together)]
        target = emitter.offset(emitter.offset(to.all, before, GROUP_INPUTS), to.row, GROUP_INPUTS * together)
        scale, total = _emit_group(emitter, numbers, target)
        start = builder.mul(total, ir.Constant(I32, -BYTE_OFFSET))
        worth = builder.fmul(scale, builder.sitofp(total, F32))
        for field, value in zip(fields, (scale, start, worth)):
            emitter.store(value, emitter.offset(field, builder.add(before, to.row), F32_BYTES))
        return []

    emitter.count(builder.udiv(to.groups, ir.Constant(I64, together)), [], one_turn)


def _emit_row(emitter: Emitter, load: Load, to: _Place, joined: ir.Value) -> None:
    """Write a row."""
    with emitter.builder.if_else(joined) as (pairs, singles):
        with pairs:
            _emit_groups(emitter, load, to, JOINED_GROUPS)
        with singles:
            _emit_groups(emitter, load, to, 1)


_PLACE = (types.intp, types.intp, types.intp, types.intp, types.boolean)


@intrinsic
def quantise_row(typing_context, numbers, to, row, rows, groups, joined):  # type: ignore[no-untyped-def]
    """Quantise a row.

    numbers: address of float32 [32 * groups], to: of the rows that lie together, row: which of these ``rows`` it becomes,
    groups: at least 1, joined: whether two and two share a scale (then their number is even).
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (numbers, *to, joined) = Emitter(builder), args
        _emit_row(emitter, lambda i: emitter.load(emitter.offset(numbers, i, VECTOR_BYTES), F32S), _Place(*to), joined)
        return context.get_dummy_value()

    return types.void(types.intp, *_PLACE), emit


@intrinsic
def _quantise_scaled_row(  # type: ignore[no-untyped-def]
    typing_context, numbers, factor, weights, to, row, rows, groups, joined
):
    """Quantise ``weights * (numbers * factor)``."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (numbers, factor, weights, *to, joined) = Emitter(builder), args
        factors = emitter.splat(factor)

        def load(index: ir.Value) -> ir.Value:
            row, scales = (emitter.load(emitter.offset(at, index, VECTOR_BYTES), F32S) for at in (numbers, weights))
            return builder.fmul(scales, builder.fmul(row, factors))

        _emit_row(emitter, load, _Place(*to), joined)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp, *_PLACE), emit


Slope = Callable[[Emitter, ir.Value], ir.Value]
"""The number s of which ``gate / (1 + exp(-s))`` is an activation."""


def _silu(emitter: Emitter, gate: ir.Value) -> ir.Value:
    return gate


def _gelu(emitter: Emitter, gate: ir.Value) -> ir.Value:
    """GELU by tanh (Hendrycks and Gimpel 2016): ``(1 + tanh(u)) / 2`` is ``1 / (1 + exp(-2 u))``."""
    square = emitter.builder.fmul(gate, gate)
    return emitter.builder.fmul(gate, emitter.fma(square, constant(F32S, _GELU_CUBE), constant(F32S, _GELU_SLOPE)))


def _emit_gated_row(emitter: Emitter, slope: Slope, gates: ir.Value, to: _Place, joined: ir.Value) -> None:
    """Write ``activation(gate) * up``."""
    builder, ups = emitter.builder, emitter.offset(gates, to.groups, GROUP_INPUTS * F32_BYTES)

    def load(index: ir.Value) -> ir.Value:
        gate, up = (emitter.load(emitter.offset(at, index, VECTOR_BYTES), F32S) for at in (gates, ups))
        below = builder.fadd(constant(F32S, 1.0), exponential(emitter, builder.fneg(slope(emitter, gate))))
        return builder.fmul(builder.fdiv(gate, below), up)

    _emit_row(emitter, load, to, joined)


@intrinsic
def quantise_gated_row(typing_context, gates, to, row, rows, groups, joined):  # type: ignore[no-untyped-def]
    """Quantise ``silu(gate) * up`` (Shazeer 2020); gates: address of float32 [32 * groups], the ups behind them."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        gates, *to, joined = args
        _emit_gated_row(Emitter(builder), _silu, gates, _Place(*to), joined)
        return context.get_dummy_value()

    return types.void(types.intp, *_PLACE), emit


@intrinsic
def quantise_gelu_gated_row(typing_context, gates, to, row, rows, groups, joined):  # type: ignore[no-untyped-def]
    """The same of ``gelu(gate) * up``, GELU being the one by tanh."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        gates, *to, joined = args
        _emit_gated_row(Emitter(builder), _gelu, gates, _Place(*to), joined)
        return context.get_dummy_value()

    return types.void(types.intp, *_PLACE), emit


@intrinsic
def _square_sum(typing_context, row, vectors):  # type: ignore[no-untyped-def]
    """The sum of a row's squares: lane i takes every 16th number from the i-th on, then the lanes are joined."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (row, vectors) = Emitter(builder), args

        def body(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            numbers = emitter.load(emitter.offset(row, index, VECTOR_BYTES), F32S)
            return [emitter.fma(numbers, numbers, sums[0])]

        (total,) = emitter.count(vectors, [constant(F32S, 0.0)], body)
        return emitter.folded(total, builder.fadd)

    return types.float32(types.intp, types.intp), emit


@intrinsic
def sum_rows(typing_context, a, b, out, groups):  # type: ignore[no-untyped-def]
    """``out = a + b``, addresses of float32 [32 * groups]; out may be one of the two."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (a, b, out, groups) = Emitter(builder), args

        def body(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            one, other = (emitter.load(emitter.offset(at, index, VECTOR_BYTES), F32S) for at in (a, b))
            emitter.store(builder.fadd(one, other), emitter.offset(out, index, VECTOR_BYTES))
            return []

        emitter.count(builder.mul(groups, ir.Constant(I64, 2)), [], body)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), emit


@intrinsic
def _scale_row(typing_context, row, factor, weights, out, vectors):  # type: ignore[no-untyped-def]
    """``out = weights * (row * factor)``, addresses of float32 [16 * vectors]; out may be the row."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (row, factor, weights, out, vectors) = Emitter(builder), args
        factors = emitter.splat(factor)

        def body(index: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            numbers, scales = (emitter.load(emitter.offset(at, index, VECTOR_BYTES), F32S) for at in (row, weights))
            scaled = builder.fmul(scales, builder.fmul(numbers, factors))
            emitter.store(scaled, emitter.offset(out, index, VECTOR_BYTES))
            return []

        emitter.count(vectors, [], body)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp, types.intp, types.intp), emit


@njit(cache=True, **INNER)
def _norm_factor(row, width, eps):  # type: ignore[no-untyped-def]
    """What a root-mean-square norm (Zhang and Sennrich 2019) multiplies ``width`` numbers by; of whole vectors."""
    return _ONE / np.sqrt(_square_sum(row, (width + LANES - 1) // LANES) / np.float32(width) + eps)


@njit(cache=True, **INNER)
def norm_row(row, width, eps, weights, out):  # type: ignore[no-untyped-def]
    """A row's norm times weights; addresses of float32, ``width`` a multiple of 16; out may be the row."""
    _scale_row(row, _norm_factor(row, width, eps), weights, out, width // LANES)


@njit(cache=True, **INNER)
def quantise_normed_row(numbers, width, eps, weights, to, row, rows, groups, joined):  # type: ignore[no-untyped-def]
    """Quantise a row's norm over ``width`` numbers, times weights."""
    _quantise_scaled_row(numbers, _norm_factor(numbers, width, eps), weights, to, row, rows, groups, joined)
