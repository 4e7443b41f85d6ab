"""Dot products of bytes as LLVM vector code: in each lane, four unsigned bytes times four signed ones.

AVX-512 VNNI, AVX-VNNI and Arm's i8mm have an instruction for it.  Arm's older dot product takes signed bytes alone, so
it takes 128 off the unsigned ones first (`OFFSETS`).  Elsewhere it is written out in 32-bit integers.  All give the same
integers, modulo 2**32.  AVX2 has nothing of the kind: what multiplies there does it in its own way (`dot_products.py`,
`wide_products.py`).  Knows nothing about what is multiplied.
"""

from collections.abc import Callable
from functools import cache

from llvmlite import ir

from helix_gateway.runtime.cpu.emitter import I8, I32, LANES, Emitter, call, constant
from helix_gateway.runtime.cpu.instruction_sets import target_features

Dot = Callable[[Emitter, ir.Value, ir.Value, ir.Value], ir.Value]
"""``dot(emitter, sums, unsigned, signed)``: sums plus the products; 16 lanes of 32 bits each, or what an instruction takes.

What is multiplied is each unsigned byte less the kind's number in `OFFSETS`.
"""

BYTE_OFFSET = 128
"""What is added to signed bytes that are stored as unsigned ones."""

_HALF, _QUARTER = LANES // 2, LANES // 4
_BYTES = 4
_NEEDED: dict[str, tuple[set[str], ...]] = {
    "vnni512": ({"avx512f", "avx512vnni"},),
    "vnni256": ({"avx2", "avxvnni"}, {"avx512vl", "avx512vnni"}),
    "avx2": ({"avx2"},),
    "i8mm": ({"i8mm"},),
    "dotprod": ({"dotprod"},),
    "portable": (set(),),
}
"""What each needs, any one of the sets; best first."""

INSTRUCTIONS = tuple(_NEEDED)
"""Names of what multiplies bytes, best first."""


@cache
def usable_dots() -> tuple[str, ...]:
    """The names of `INSTRUCTIONS` that code is compiled for, best first."""
    features = target_features()
    return tuple(name for name, choices in _NEEDED.items() if any(needed <= features for needed in choices))


def host_dot() -> str:
    """The best of them."""
    return usable_dots()[0]


def _bytes_of(emitter: Emitter, words: ir.Value) -> ir.Value:
    """Words as vectors of bytes, which is what this LLVM's intrinsics take."""
    return emitter.builder.bitcast(words, ir.VectorType(I8, _BYTES * words.type.count))


def _vnni512(emitter: Emitter, sums: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    pair = (_bytes_of(emitter, unsigned), _bytes_of(emitter, signed))
    return call(emitter.builder, "llvm.x86.avx512.vpdpbusd.512", sums.type, sums, *pair)


def in_parts(emitter: Emitter, lanes: int, vectors: tuple[ir.Value, ...], join: Callable[..., ir.Value]) -> ir.Value:
    """``join`` of the first ``lanes`` lanes of some vectors, of the next ones and so on, put together again."""
    if vectors[0].type.count == lanes:
        return join(*vectors)
    builder, parts = emitter.builder, []
    for first in range(0, vectors[0].type.count, lanes):
        picks = ir.Constant(ir.VectorType(I32, lanes), list(range(first, first + lanes)))
        parts.append(join(*(builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), picks) for v in vectors)))
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2])
        lanes *= 2
        whole = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        parts = [builder.shuffle_vector(low, high, whole) for low, high in pairs]
    return parts[0]


def _vnni256(emitter: Emitter, sums: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    def join(total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        pair = (_bytes_of(emitter, a), _bytes_of(emitter, b))
        return call(emitter.builder, "llvm.x86.avx512.vpdpbusd.256", total.type, total, *pair)

    return in_parts(emitter, _HALF, (sums, unsigned, signed), join)


def _by_neon(name: str, emitter: Emitter, sums: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """One of Arm's dot products of 16 bytes by 16, four times."""

    def join(total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        pair = (_bytes_of(emitter, x), _bytes_of(emitter, y))
        return call(emitter.builder, f"llvm.aarch64.neon.{name}.v{_QUARTER}i32.v16i8", total.type, total, *pair)

    return in_parts(emitter, _QUARTER, (sums, a, b), join)


def _i8mm(emitter: Emitter, sums: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    return _by_neon("usdot", emitter, sums, unsigned, signed)


def add_signed_bytes(emitter: Emitter, sums: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """Arm's dot product of signed bytes by signed ones; the arguments are those of a `Dot`."""
    return _by_neon("sdot", emitter, sums, a, b)


def without_offset(emitter: Emitter, unsigned: ir.Value) -> ir.Value:
    """Unsigned bytes less `BYTE_OFFSET`, as signed ones."""
    return emitter.builder.xor(unsigned, constant(unsigned.type, 0x80808080))


def _dotprod(emitter: Emitter, sums: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    return add_signed_bytes(emitter, sums, without_offset(emitter, unsigned), signed)


def _portable(emitter: Emitter, sums: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    builder, top = emitter.builder, constant(sums.type, 24)
    for byte in range(_BYTES):
        up = constant(sums.type, 24 - 8 * byte)
        a, b = builder.lshr(builder.shl(unsigned, up), top), builder.ashr(builder.shl(signed, up), top)
        sums = builder.add(sums, builder.mul(a, b))
    return sums


DOTS: dict[str, Dot] = {
    "vnni512": _vnni512,
    "vnni256": _vnni256,
    "i8mm": _i8mm,
    "dotprod": _dotprod,
    "portable": _portable,
}
"""By the name of what they need; none of AVX2."""

OFFSETS = {name: BYTE_OFFSET if name == "dotprod" else 0 for name in DOTS}
"""What each takes off the unsigned bytes before it multiplies them."""
