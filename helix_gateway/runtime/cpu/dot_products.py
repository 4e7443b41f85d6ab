"""Sums of four products of bytes in every lane, exact, in the instructions that a processor has.

A lane of weights holds four unsigned bytes, a lane of activations the same four signed bytes everywhere, and what comes
out is one int32 a lane.  Weights of eight bits are stored as ``w + 128`` and must come out as if they were signed; small
ones (0 to 15) are what they are.  Activations lie in -127 .. 127.  All sums are exact, so which instructions made them
cannot be seen in the result.  Knows nothing about tiles, scales or groups.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from llvmlite import ir

from helix_gateway.runtime.cpu.emitter import I8, I16, I32, I32S, LANES, Emitter, call, constant
from helix_gateway.runtime.cpu.integer_dot import (
    DOTS,
    add_signed_bytes,
    usable_dots,
    without_offset,
)

_HALF = LANES // 2
_I32_HALF = ir.VectorType(I32, _HALF)
_I16_HALF = ir.VectorType(I16, 2 * _HALF)
_I8_HALF = ir.VectorType(I8, 4 * _HALF)


class DotProducts(ABC):
    """How one instruction set does it; values of Python are written into the code, values of LLVM are computed by it."""

    registers: ClassVar[int]
    """Vectors of 16 lanes that fit the registers."""

    @abstractmethod
    def signed_start(self, emitter: Emitter, start: ir.Value) -> ir.Value:
        """What a sum over eight-bit weights begins with; start: int32, -128 times the sum of all its activations."""

    @abstractmethod
    def signed_weights(self, emitter: Emitter, stored: ir.Value) -> Any:
        """Sixteen lanes of eight-bit weights, made ready for `add_signed`."""

    @abstractmethod
    def add_signed(self, emitter: Emitter, sums: ir.Value, weights: Any, x: ir.Value) -> ir.Value:
        """``sums`` and the products of four inputs; x: an int32 of four signed bytes."""

    @abstractmethod
    def small_start(self) -> ir.Value:
        """What a sum over small weights begins with."""

    @abstractmethod
    def add_small(self, emitter: Emitter, sums: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """Like `add_signed` for unsigned weights up to 15, at most eight times after one start."""

    @abstractmethod
    def small_sums(self, emitter: Emitter, sums: ir.Value) -> ir.Value:
        """What `add_small` has summed up, as int32."""


class _Alike(DotProducts):
    """Small weights are added as eight-bit ones are."""

    def small_start(self) -> ir.Value:
        """See `DotProducts`."""
        return constant(I32S, 0)

    def add_small(self, emitter: Emitter, sums: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return self.add_signed(emitter, sums, weights, x)

    def small_sums(self, emitter: Emitter, sums: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return sums


class _ByBytes(_Alike):
    """By a dot product of unsigned bytes by signed ones; the activations are the same in every lane.

    Weights are taken as they are stored, so that 128 times the activations' sum is too much.
    """

    dot: ClassVar[str]
    """Its name in `DOTS`."""

    def signed_start(self, emitter: Emitter, start: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return emitter.splat(start)

    def signed_weights(self, emitter: Emitter, stored: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return stored

    def add_signed(self, emitter: Emitter, sums: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return DOTS[self.dot](emitter, sums, weights, emitter.splat(x))


class Avx512Vnni(_ByBytes):
    """``vpdpbusd`` on 512 bits; its activations come from memory, spread by the same instruction."""

    dot, registers = "vnni512", 32


class AvxVnni(_ByBytes):
    """``vpdpbusd`` on 256 bits."""

    dot, registers = "vnni256", 8


class Avx2(DotProducts):
    """``pmaddubsw`` and ``pmaddwd``, whose sums of two products must fit 16 bits.

    Two products of an unsigned and a signed byte may not (255 × 127 × 2 is too much), so eight-bit weights give their
    signs to the activations: 128 × 127 × 2 fits.  Sixteen products of small weights fit too (15 × 127 × 16), so a whole
    group of 32 inputs is summed in 16 bits.
    """

    registers = 8

    def signed_start(self, emitter: Emitter, start: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return constant(I32S, 0)

    def signed_weights(self, emitter: Emitter, stored: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """See `DotProducts`."""
        builder, halves = emitter.builder, []
        signed = without_offset(emitter, stored)
        for number in range(2):
            weights = builder.bitcast(_half(emitter, signed, number), _I8_HALF)
            keep_least = ir.Constant(ir.IntType(1), 0)  # |-128| is 128, unsigned
            halves.append((call(builder, "llvm.abs.v32i8", _I8_HALF, weights, keep_least), weights))
        return halves

    def add_signed(self, emitter: Emitter, sums: ir.Value, weights: Any, x: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        builder = emitter.builder
        spread = builder.bitcast(_half(emitter, emitter.splat(x), 0), _I8_HALF)
        halves = []
        for number, (size, sign) in enumerate(weights):
            signed = call(builder, "llvm.x86.avx2.psign.b", _I8_HALF, spread, sign)
            pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", _I16_HALF, size, signed)
            halves.append(builder.add(_half(emitter, sums, number), _pair_sums(emitter, pairs)))
        return _joined(emitter, halves)

    def small_start(self) -> ir.Value:
        """See `DotProducts`."""
        return ir.Constant(ir.VectorType(I16, 2 * LANES), [0] * (2 * LANES))

    def add_small(self, emitter: Emitter, sums: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        builder = emitter.builder
        spread = builder.bitcast(_half(emitter, emitter.splat(x), 0), _I8_HALF)
        halves = [
            call(
                builder,
                "llvm.x86.avx2.pmadd.ub.sw",
                _I16_HALF,
                builder.bitcast(_half(emitter, weights, number), _I8_HALF),
                spread,
            )
            for number in range(2)
        ]
        return builder.add(sums, _joined(emitter, halves))

    def small_sums(self, emitter: Emitter, sums: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return _joined(emitter, [_pair_sums(emitter, _half(emitter, sums, number)) for number in range(2)])


class ArmI8mm(_ByBytes):
    """``usdot``, which Armv8.6's matrix instructions brought along, on 128 bits.

    Its sibling ``smmla`` multiplies two rows by two channels over eight inputs, in half as many instructions; but its sums
    would be neither rows nor lanes of channels, and one row, most of what a server computes, would waste half of them.
    """

    dot, registers = "i8mm", 8


class ArmDotProduct(_Alike):
    """``sdot`` on 128 bits: signed bytes by signed ones, so eight-bit weights lose their offset first."""

    registers = 8

    def signed_start(self, emitter: Emitter, start: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return constant(I32S, 0)

    def signed_weights(self, emitter: Emitter, stored: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return without_offset(emitter, stored)

    def add_signed(self, emitter: Emitter, sums: ir.Value, weights: Any, x: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return add_signed_bytes(emitter, sums, weights, emitter.splat(x))


class Portable(_ByBytes):
    """Shifts, products and sums of 32 bits, which every processor has in some width."""

    dot, registers = "portable", 8


def _half(emitter: Emitter, vector: ir.Value, number: int) -> ir.Value:
    """The lower or upper half of a vector's elements."""
    size = vector.type.count // 2
    picks = ir.Constant(ir.VectorType(I32, size), list(range(number * size, (number + 1) * size)))
    return emitter.builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), picks)


def _joined(emitter: Emitter, halves: list[ir.Value]) -> ir.Value:
    size = 2 * halves[0].type.count
    return emitter.builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, size), list(range(size))))


def _pair_sums(emitter: Emitter, pairs: ir.Value) -> ir.Value:
    """Sums of neighbours of 16 int16, as 8 int32."""
    ones = ir.Constant(_I16_HALF, [1] * (2 * _HALF))
    return call(emitter.builder, "llvm.x86.avx2.pmadd.wd", _I32_HALF, pairs, ones)


DOT_PRODUCTS: tuple[DotProducts, ...] = (
    Avx512Vnni(),
    AvxVnni(),
    Avx2(),
    ArmI8mm(),
    ArmDotProduct(),
    Portable(),
)
"""In the order of `DOTS`, best first."""


def usable_dot_products() -> list[int]:
    """Places in `DOT_PRODUCTS` of those that the processor can run, best first."""
    return [place for place, name in enumerate(DOTS) if name in usable_dots()]


HOST_DOT = usable_dot_products()[0]
"""The place of the best one; an integer, since numba knows cached code by such."""
