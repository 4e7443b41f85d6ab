"""Sums of four products of bytes in every lane, exact, in the instructions that a processor has.

A lane of weights holds four unsigned bytes, a lane of activations the same four signed bytes everywhere, and what comes
out is one int32 a lane; an emitter says how many lanes there are.  Weights of eight bits are stored as ``w + 128`` and
must come out as if they were signed; small ones (0 to 15) are what they are.  Activations lie in -127 .. 127.  All sums
are exact, so which instructions made them cannot be seen in the result.  Knows nothing about tiles, scales or groups.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from llvmlite import ir

from helix_gateway.runtime.cpu.emitter import I8, I16, I32, LANES, Emitter, call, constant
from helix_gateway.runtime.cpu.integer_dot import (
    DOTS,
    INSTRUCTIONS,
    add_signed_bytes,
    usable_dots,
    without_offset,
)

_HALF = LANES // 2
_I32S, _I16S, _I8S = (ir.VectorType(element, count * _HALF) for element, count in ((I32, 1), (I16, 2), (I8, 4)))
"""What one register of AVX2 holds."""


class DotProducts(ABC):
    """How one instruction set does it; values of Python are written into the code, values of LLVM are computed by it."""

    lanes: ClassVar[int] = LANES
    """Of a vector: as many as a register has, where LLVM is not to choose in which order parts of one are computed."""
    sums: ClassVar[int]
    """Vectors of sums that stay in registers while the products of a group are added to them, others taking turns."""
    few_rows: ClassVar[int]
    """Most rows that share one reading of a tile which the nearest cache holds; up to ``sums``."""

    @abstractmethod
    def signed_start(self, emitter: Emitter, start: ir.Value) -> ir.Value:
        """What a sum over eight-bit weights begins with; start: int32, -128 times the sum of all its activations."""

    @abstractmethod
    def signed_weights(self, emitter: Emitter, stored: ir.Value) -> Any:
        """A vector of eight-bit weights, made ready for `add_signed`."""

    @abstractmethod
    def add_signed(self, emitter: Emitter, sums: ir.Value, weights: Any, x: ir.Value) -> ir.Value:
        """``sums`` and the products of four inputs; x: an int32 of four signed bytes."""

    @abstractmethod
    def small_start(self, emitter: Emitter) -> ir.Value:
        """What a sum over small weights begins with."""

    @abstractmethod
    def add_small(self, emitter: Emitter, sums: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """Like `add_signed` for unsigned weights up to 15, at most eight times after one start."""

    @abstractmethod
    def small_sums(self, emitter: Emitter, sums: ir.Value) -> ir.Value:
        """What `add_small` has summed up, as int32."""


class _Alike(DotProducts):
    """Small weights are added as eight-bit ones are."""

    def small_start(self, emitter: Emitter) -> ir.Value:
        """See `DotProducts`."""
        return constant(emitter.vector(I32), 0)

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

    dot, sums, few_rows = "vnni512", 12, 6


class AvxVnni(_ByBytes):
    """``vpdpbusd`` on 256 bits."""

    dot, lanes, sums, few_rows = "vnni256", _HALF, 8, 8


class Avx2(DotProducts):
    """``pmaddubsw`` and ``pmaddwd``, whose sums of two products must fit 16 bits.

    Two products of an unsigned and a signed byte may not (255 × 127 × 2 is too much), so eight-bit weights give their
    signs to the activations: 128 × 127 × 2 fits.  Sixteen products of small weights fit too (15 × 127 × 16), so a whole
    group of 32 inputs is summed in 16 bits.
    """

    lanes, sums, few_rows = _HALF, 8, 8

    def signed_start(self, emitter: Emitter, start: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return constant(_I32S, 0)

    def signed_weights(self, emitter: Emitter, stored: ir.Value) -> tuple[ir.Value, ir.Value]:
        """See `DotProducts`."""
        weights = emitter.builder.bitcast(without_offset(emitter, stored), _I8S)
        keep_least = ir.Constant(ir.IntType(1), 0)  # |-128| is 128, unsigned
        return call(emitter.builder, "llvm.abs.v32i8", _I8S, weights, keep_least), weights

    def add_signed(self, emitter: Emitter, sums: ir.Value, weights: Any, x: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        builder, (size, sign) = emitter.builder, weights
        signed = call(builder, "llvm.x86.avx2.psign.b", _I8S, _spread(emitter, x), sign)
        return builder.add(sums, _pair_sums(emitter, _pair_products(emitter, size, signed)))

    def small_start(self, emitter: Emitter) -> ir.Value:
        """See `DotProducts`."""
        return constant(_I16S, 0)

    def add_small(self, emitter: Emitter, sums: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        products = _pair_products(emitter, emitter.builder.bitcast(weights, _I8S), _spread(emitter, x))
        return emitter.builder.add(sums, products)

    def small_sums(self, emitter: Emitter, sums: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return _pair_sums(emitter, sums)


class ArmI8mm(_ByBytes):
    """``usdot``, which Armv8.6's matrix instructions brought along, on 128 bits.

    Its sibling ``smmla`` multiplies two rows by two channels over eight inputs, in half as many instructions; but its sums
    would be neither rows nor lanes of channels, and one row, most of what a server computes, would waste half of them.
    """

    dot, sums, few_rows = "i8mm", 4, 4


class ArmDotProduct(_Alike):
    """``sdot`` on 128 bits: signed bytes by signed ones, so eight-bit weights lose their offset first."""

    sums, few_rows = 4, 4

    def signed_start(self, emitter: Emitter, start: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return constant(emitter.vector(I32), 0)

    def signed_weights(self, emitter: Emitter, stored: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return without_offset(emitter, stored)

    def add_signed(self, emitter: Emitter, sums: ir.Value, weights: Any, x: ir.Value) -> ir.Value:
        """See `DotProducts`."""
        return add_signed_bytes(emitter, sums, weights, emitter.splat(x))


class Portable(_ByBytes):
    """Shifts, products and sums of 32 bits, which every processor has in some width."""

    dot, sums, few_rows = "portable", 4, 4


def _spread(emitter: Emitter, x: ir.Value) -> ir.Value:
    """Four bytes, in every lane of AVX2."""
    return emitter.builder.bitcast(emitter.splat(x), _I8S)


def _pair_products(emitter: Emitter, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """Sums of the products of two neighbours, 16 int16; they saturate."""
    return call(emitter.builder, "llvm.x86.avx2.pmadd.ub.sw", _I16S, unsigned, signed)


def _pair_sums(emitter: Emitter, pairs: ir.Value) -> ir.Value:
    """Sums of neighbours of 16 int16, as 8 int32."""
    return call(emitter.builder, "llvm.x86.avx2.pmadd.wd", _I32S, pairs, constant(_I16S, 1))


DOT_PRODUCTS: tuple[DotProducts, ...] = (
    Avx512Vnni(),
    AvxVnni(),
    Avx2(),
    ArmI8mm(),
    ArmDotProduct(),
    Portable(),
)
"""In the order of `INSTRUCTIONS`, best first."""


def usable_dot_products() -> list[int]:
    """Places in `DOT_PRODUCTS` of those that the processor can run, best first."""
    return [place for place, name in enumerate(INSTRUCTIONS) if name in usable_dots()]


HOST_DOT = usable_dot_products()[0]
"""The place of the best one; an integer, since numba knows cached code by such."""
