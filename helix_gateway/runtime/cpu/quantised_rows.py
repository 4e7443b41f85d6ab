"""Rows of float32 become int8 in groups of 32 with a scale each: the records that quantised products take.

A record holds, one after another: the int8 of all groups (zeros behind the last input), then of each group a float32,
what one step of its numbers is worth (its largest magnitude over 127), then of each the int32 sum of its numbers, then
of each the product of both.  Rows of float32 are padded with zeros to whole groups too.  What becomes of a row depends on
that row alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

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
from helix_gateway.runtime.cpu.quantised_kernels import GROUP_FIELDS, GROUP_INPUTS
from helix_gateway.runtime.cpu.vector_math import exponential

_LARGEST = 127.0
# A group whose numbers are all smaller than this becomes zeros: the inverse of its scale might not be finite.
_SMALLEST = 1e-30
_LINE_BYTES = 64
_ONE = np.float32(1.0)
# Twice the square root of 2 / pi, and 0.044715 of that.
_GELU_SLOPE = 1.5957691216057308
_GELU_CUBE = 0.044715 * _GELU_SLOPE


def num_groups(inputs: int) -> int:
    """Groups that so many inputs are padded to."""
    return -(-inputs // GROUP_INPUTS)


def record_bytes(groups: int) -> int:
    """Bytes from one record to the next."""
    return -(-groups * (GROUP_INPUTS + GROUP_FIELDS * F32_BYTES) // _LINE_BYTES) * _LINE_BYTES


Load = Callable[[ir.Value], ir.Value]
"""The i-th 16 numbers of a row."""


def _greater(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _emit_group(emitter: Emitter, numbers: list[ir.Value], target: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Write a group's int8; returns its scale and its sum."""
    builder = emitter.builder
    sizes = [call(builder, f"llvm.fabs.v{LANES}f32", F32S, vector) for vector in numbers]
    top = emitter.folded(_greater(builder, *sizes), lambda a, b: _greater(builder, a, b))
    usable = builder.fcmp_ordered(">", top, ir.Constant(F32, _SMALLEST))
    top = builder.select(usable, top, ir.Constant(F32, _LARGEST))
    inverse, steps = emitter.splat(builder.fdiv(ir.Constant(F32, _LARGEST), top)), []
    for place, vector in enumerate(numbers):
        nearest = call(builder, f"llvm.rint.v{LANES}f32", F32S, builder.fmul(vector, inverse))
        steps.append(builder.fptosi(nearest, I32S))
        emitter.store(builder.trunc(steps[-1], I8S), emitter.offset(target, LANES * place), LANES)
    total = call(builder, f"llvm.vector.reduce.add.v{LANES}i32", I32, builder.add(*steps))
    return builder.fdiv(top, ir.Constant(F32, _LARGEST)), total


def _emit_record(emitter: Emitter, load: Load, record: ir.Value, groups: ir.Value) -> None:
    """Write the record of a row."""
    builder = emitter.builder
    fields = [emitter.offset(record, groups, GROUP_INPUTS + F32_BYTES * field) for field in range(GROUP_FIELDS)]

    def one_group(group: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        first = builder.mul(group, ir.Constant(I64, 2))
        numbers = [load(builder.add(first, ir.Constant(I64, half))) for half in range(2)]
        scale, total = _emit_group(emitter, numbers, emitter.offset(record, group, GROUP_INPUTS))
        worth = builder.fmul(scale, builder.sitofp(total, F32))
        for field, value in zip(fields, (scale, total, worth)):
            emitter.store(value, emitter.offset(field, group, F32_BYTES))
        return []

    emitter.count(groups, [], one_group)


@intrinsic
def quantise_row(typing_context, row, record, groups):  # type: ignore[no-untyped-def]
    """The record of a row; row: address of float32 [32 * groups], record: address, groups: at least 1."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (row, record, groups) = Emitter(builder), args
        _emit_record(emitter, lambda i: emitter.load(emitter.offset(row, i, VECTOR_BYTES), F32S), record, groups)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), emit


@intrinsic
def _quantise_scaled_row(typing_context, row, factor, weights, record, groups):  # type: ignore[no-untyped-def]
    """The record of ``weights * (row * factor)``."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (row, factor, weights, record, groups) = Emitter(builder), args
        factors = emitter.splat(factor)

        def load(index: ir.Value) -> ir.Value:
            numbers, scales = (emitter.load(emitter.offset(at, index, VECTOR_BYTES), F32S) for at in (row, weights))
            return builder.fmul(scales, builder.fmul(numbers, factors))

        _emit_record(emitter, load, record, groups)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp, types.intp, types.intp), emit


Slope = Callable[[Emitter, ir.Value], ir.Value]
"""The number s of which ``gate / (1 + exp(-s))`` is an activation."""


def _silu(emitter: Emitter, gate: ir.Value) -> ir.Value:
    return gate


def _gelu(emitter: Emitter, gate: ir.Value) -> ir.Value:
    """GELU by tanh (Hendrycks and Gimpel 2016): ``(1 + tanh(u)) / 2`` is ``1 / (1 + exp(-2 u))``."""
    square = emitter.builder.fmul(gate, gate)
    return emitter.builder.fmul(gate, emitter.fma(square, constant(F32S, _GELU_CUBE), constant(F32S, _GELU_SLOPE)))


def _emit_gated_record(emitter: Emitter, slope: Slope, row: ir.Value, record: ir.Value, groups: ir.Value) -> None:
    """The record of ``activation(gate) * up``."""
    builder, ups = emitter.builder, emitter.offset(row, groups, GROUP_INPUTS * F32_BYTES)

    def load(index: ir.Value) -> ir.Value:
        gate, up = (emitter.load(emitter.offset(at, index, VECTOR_BYTES), F32S) for at in (row, ups))
        below = builder.fadd(constant(F32S, 1.0), exponential(emitter, builder.fneg(slope(emitter, gate))))
        return builder.fmul(builder.fdiv(gate, below), up)

    _emit_record(emitter, load, record, groups)


@intrinsic
def quantise_gated_row(typing_context, row, record, groups):  # type: ignore[no-untyped-def]
    """The record of ``silu(gate) * up`` (Shazeer 2020); row: address of the gates, float32 [32 * groups], then the ups."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _emit_gated_record(Emitter(builder), _silu, *args)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), emit


@intrinsic
def quantise_gelu_gated_row(typing_context, row, record, groups):  # type: ignore[no-untyped-def]
    """The same of ``gelu(gate) * up``, GELU being the one by tanh."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _emit_gated_record(Emitter(builder), _gelu, *args)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), emit


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


@njit(cache=True)
def _norm_factor(row, width, eps):  # type: ignore[no-untyped-def]
    """What a root-mean-square norm (Zhang and Sennrich 2019) multiplies ``width`` numbers by; of whole vectors."""
    return _ONE / np.sqrt(_square_sum(row, (width + LANES - 1) // LANES) / np.float32(width) + eps)


@njit(cache=True)
def norm_row(row, width, eps, weights, out):  # type: ignore[no-untyped-def]
    """A row's norm times weights; addresses of float32, ``width`` a multiple of 16; out may be the row."""
    _scale_row(row, _norm_factor(row, width, eps), weights, out, width // LANES)


@njit(cache=True)
def quantise_normed_row(row, width, eps, weights, record, groups):  # type: ignore[no-untyped-def]
    """The record of a row's norm over ``width`` numbers, times weights."""
    _quantise_scaled_row(row, _norm_factor(row, width, eps), weights, record, groups)
