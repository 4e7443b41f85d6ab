"""Rotary embedding of queries and keys in place (Su et al. 2021), sixteen pairs of numbers at a time.

Each number is two products and their sum, rounded one after another, however many are computed together.  Knows nothing
about where cosines and sines come from.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from helix_gateway.core.inner_functions import INNER
from helix_gateway.runtime.cpu.attention_kernels import FLOATS, load_element, load_vector, store_element, store_vector
from helix_gateway.runtime.cpu.emitter import F32_BYTES, F32S, LANES, VECTOR_BYTES, Emitter


@intrinsic
def _rotate_lanes(typing_context, kind, low, high, cosines, sines, apart):  # type: ignore[no-untyped-def]
    """Sixteen numbers at ``low`` and as many at ``high`` turned; those at ``high`` have their angles ``apart`` bytes farther."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emitter, (_, low, high, cosines, sines, apart) = Emitter(builder), args
        a, b = load_vector(emitter, kind, low), load_vector(emitter, kind, high)
        cosine, sine = emitter.load(cosines, F32S), emitter.load(sines, F32S)
        store_vector(emitter, kind, builder.fsub(builder.fmul(a, cosine), builder.fmul(b, sine)), low)
        cosine, sine = (emitter.load(builder.add(angles, apart), F32S) for angles in (cosines, sines))
        store_vector(emitter, kind, builder.fadd(builder.fmul(b, cosine), builder.fmul(a, sine)), high)
        return context.get_dummy_value()

    return types.void(kind, *[types.intp] * 5), emit


@njit(cache=True, **INNER)
def _angles_at(cosines, sines, offset):  # type: ignore[no-untyped-def]
    return load_element(FLOATS, cosines + offset), load_element(FLOATS, sines + offset)


@njit(cache=True, **INNER)
def _rotate_head(kind, low, cosines, sines, half):  # type: ignore[no-untyped-def]
    """One head of one row, halves as transformers pairs them; the row's cosines and sines by their addresses."""
    size, apart = kind.itemsize, half * F32_BYTES
    high, whole = low + half * size, half // LANES
    for block in range(whole):
        at, angle = block * LANES * size, block * VECTOR_BYTES
        _rotate_lanes(kind, low + at, high + at, cosines + angle, sines + angle, apart)
    for i in range(whole * LANES, half):
        a, b = load_element(kind, low + i * size), load_element(kind, high + i * size)
        cosine, sine = _angles_at(cosines, sines, i * F32_BYTES)
        store_element(kind, low + i * size, a * cosine - b * sine)
        cosine, sine = _angles_at(cosines, sines, apart + i * F32_BYTES)
        store_element(kind, high + i * size, b * cosine + a * sine)


@njit(cache=True)
def rotate_rows(kind, first, last, product, channels, heads, dim, positions, cosines, sines):  # type: ignore[no-untyped-def]
    """Rotary embedding of the queries and keys of the rows first:last.

    Tables narrower than a head turn its first dimensions only.

    Args:
        kind: an array of the dtype of what is at ``product``, [rows, channels], of which the first ``heads * dim`` are turned.
        positions: of each row.
        cosines, sines: float32 [positions, rotated dimensions], contiguous.
    """
    width, size = cosines.shape[1], kind.itemsize
    for row in range(first, last):
        at = positions[row] * width * F32_BYTES
        for head in range(heads):
            low = product + (row * channels + head * dim) * size
            _rotate_head(kind, low, cosines.ctypes.data + at, sines.ctypes.data + at, width // 2)
