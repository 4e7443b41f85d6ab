"""Products of numbers of 16 bits and stored bytes, as LLVM vector code: queries and keys, attention weights and values.

Bytes lie in fours, one of each lane; the numbers that they are multiplied by are the same in every lane.  A number is kept
in *planes*, two bytes for each, so that four numbers are one word of either plane.  What is in a plane, and how many sums
of 32 bits a row needs, depends on the processor; what comes out does not, since every sum is exact.  Knows nothing about
heads, pages or scales.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from llvmlite import ir

from helix_gateway.runtime.cpu.emitter import I8S, I16, I16S, I32, LANES, Emitter, call, constant
from helix_gateway.runtime.cpu.integer_dot import BYTE_OFFSET, DOTS, OFFSETS, host_dot, in_parts

PLANES = 2
TOP_16 = 127 * 256
"""The largest number: its high byte is at most 127 whatever the low one."""

_HALF = LANES // 2


class WideProducts(ABC):
    """How a kind of processor does it; a row's total is ``first_worth`` times its first sum plus the other, if there is one."""

    num_sums: ClassVar[int]
    """Of a row: vectors of int32."""
    first_worth: ClassVar[int]
    offset_left: int
    """What is to be taken off every stored byte, in the start of a sum or afterwards."""
    most_tokens: ClassVar[int]
    """Tokens whose weights times values the sums hold, whatever both are: up to `TOP_16` and 255."""
    most_dims: ClassVar[int]
    """Dimensions of queries and keys that they hold: up to `TOP_16` and 127."""
    max_rows: int
    """Of one call."""
    max_sums: int
    """Vectors of sums of one call, as many as registers hold beside what is multiplied."""

    @abstractmethod
    def planes(self, emitter: Emitter, numbers: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Sixteen int32 as 16 bytes of either plane; and what of each number belongs to the second sum."""

    @abstractmethod
    def taken(self, emitter: Emitter, stored: ir.Value) -> Any:
        """Sixteen words of stored bytes, made ready for `add`."""

    @abstractmethod
    def add(self, emitter: Emitter, sums: list[ir.Value], taken: Any, words: list[ir.Value]) -> list[ir.Value]:
        """A row's sums and its products; words: one of each plane, in every lane."""


class _ByBytes(WideProducts):
    """A plane of high bytes and one of low ones, ``256 * high + low``, both signed: a dot product of bytes for each."""

    num_sums, first_worth, most_tokens, most_dims = 2, 256, 1 << 16, 1 << 16

    def __init__(self, dot: str, max_rows: int, max_sums: int) -> None:
        self._dot, self.max_rows, self.max_sums = DOTS[dot], max_rows, max_sums
        self.offset_left = BYTE_OFFSET - OFFSETS[dot]

    def planes(self, emitter: Emitter, numbers: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `WideProducts`."""
        builder = emitter.builder
        low = builder.trunc(numbers, I8S)
        below = builder.sext(low, numbers.type)
        above = builder.ashr(builder.sub(numbers, below), constant(numbers.type, 8))
        return builder.trunc(above, I8S), low, below

    def taken(self, emitter: Emitter, stored: ir.Value) -> ir.Value:
        """See `WideProducts`."""
        return stored

    def add(self, emitter: Emitter, sums: list[ir.Value], taken: Any, words: list[ir.Value]) -> list[ir.Value]:
        """See `WideProducts`."""
        return [self._dot(emitter, total, taken, word) for total, word in zip(sums, words)]


class _ByPairs(WideProducts):
    """AVX2's product of 16-bit pairs, which takes a number as it is: a plane of the 1st and 3rd of four, and one of the others.

    Widened bytes are unsigned.  One sum is enough, half as many products as for bytes, but it holds fewer of them.
    """

    num_sums, first_worth, most_tokens, most_dims = 1, 1, 256, 512
    max_rows, max_sums, offset_left = 4, 4, BYTE_OFFSET

    def planes(self, emitter: Emitter, numbers: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `WideProducts`."""
        builder = emitter.builder
        narrow = builder.trunc(numbers, I16S)
        picks = (ir.Constant(ir.VectorType(I32, _HALF), list(range(first, LANES, 2))) for first in range(PLANES))
        first, second = (builder.shuffle_vector(narrow, ir.Constant(I16S, ir.Undefined), pick) for pick in picks)
        return builder.bitcast(first, I8S), builder.bitcast(second, I8S), constant(numbers.type, 0)

    def taken(self, emitter: Emitter, stored: ir.Value) -> tuple[ir.Value, ir.Value]:
        """See `WideProducts`."""
        words = emitter.builder.bitcast(stored, ir.VectorType(I16, 2 * LANES))
        first = emitter.builder.and_(words, constant(words.type, 255))
        second = emitter.builder.lshr(words, constant(words.type, 8))
        return tuple(emitter.builder.bitcast(pairs, stored.type) for pairs in (first, second))

    def add(self, emitter: Emitter, sums: list[ir.Value], taken: Any, words: list[ir.Value]) -> list[ir.Value]:
        """See `WideProducts`."""

        def join(total: ir.Value, stored: ir.Value, word: ir.Value) -> ir.Value:
            pair = (emitter.builder.bitcast(side, I16S) for side in (stored, word))
            return emitter.builder.add(total, call(emitter.builder, "llvm.x86.avx2.pmadd.wd", total.type, *pair))

        (total,) = sums
        for stored, word in zip(taken, words):
            total = in_parts(emitter, _HALF, (total, stored, word), join)
        return [total]


def _of_host() -> WideProducts:
    dot = host_dot()
    if dot == "avx2":
        return _ByPairs()
    # 32 registers of a whole vector each, and elsewhere 16 or 32 of half or a quarter of one.
    return _ByBytes(dot, max_rows=6, max_sums=24) if dot == "vnni512" else _ByBytes(dot, max_rows=2, max_sums=6)


HOST_WIDE = _of_host()
