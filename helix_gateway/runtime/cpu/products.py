"""The compiled products behind `linear.py`: all rows times all tiles, on one thread or several.

Everything is an integer here, addresses included, which keeps a call from Python cheap.  A processor gets the block
shape that fits its registers; the shape never changes a bit of the result, and neither do rows or threads (each sum is
one chain, see `microkernels.multiply_tile`).  Knows nothing about torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from numba import carray, njit, prange

from helix_gateway.runtime.cpu.instruction_sets import target_features
from helix_gateway.runtime.cpu.math import load_bf16
from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS, float32s_at, multiply_tile, uint16s_at

_BFLOAT16_BITS = 16
# A row block alone fetches weights this far ahead (measured among 1 to 8 KB, into either cache level).
_PREFETCH_BYTES = 4096
# Between rows of widened activations, so that rows of 1,024 inputs do not all fall on the same lines of the cache.
_WIDE_GAP = 16
# Activations fewer than this are widened on the calling thread: a parallel region would cost more.
_SERIAL_WIDENING = 1 << 15


@dataclass(frozen=True, slots=True)
class BlockShape:
    """How many rows share one pass over a tile, and how many vectors of 16 lanes the registers hold."""

    max_rows: int
    registers: int


WIDE = BlockShape(max_rows=12, registers=32)
"""AVX-512: 24 sums, 2 vectors of weights and an input."""
NARROW = BlockShape(max_rows=6, registers=8)
"""AVX2, with two registers for each vector: 6 sums, one vector of weights and an input."""


@cache
def host_shape() -> BlockShape:
    """The shape that suits the instructions that code is compiled for."""
    return WIDE if "avx512f" in target_features() else NARROW


@dataclass(frozen=True, slots=True)
class Products:
    """``serial(rows, x, x_stride, wide, tiles, inputs, bias, out, channels)``; `parallel` takes the threads first.

    x has the weights' dtype and rows ``x_stride`` elements apart.  wide is scratch for x as float32, of
    ``wide_elements(rows, inputs)``, of no use (0) where x is float32.  Tiles are as `linear.py` packs them; bias is
    float32 [channels, padded to tiles]; out [rows, channels] has the weights' dtype and is contiguous.
    """

    serial: Callable[..., None]
    parallel: Callable[..., None]


def wide_elements(rows: int, inputs: int) -> int:
    """float32 elements of scratch that a product of bfloat16 rows needs."""
    return rows * (inputs + _WIDE_GAP)


@cache
def products(bits: int, shape: BlockShape) -> Products:
    """The products for weights and outputs of 32 (float32) or 16 (bfloat16) bits; compiled at their first call."""
    return Products(
        serial=_serial_product(bits, shape.max_rows, shape.registers),
        parallel=_parallel_product(bits, shape.max_rows, shape.registers),
    )


# The closures below hold integers alone: numba's cache knows a closure by its values, and those of an intrinsic or a
# compiled function would be new in each process.


@njit(inline="always")
def multiply_share(  # type: ignore[no-untyped-def]
    bits, max_rows, registers, thread, threads, rows, x, x_stride, tiles, inputs, bias, out, channels
):
    """A thread's share of the tiles, one after the other: while a tile is in the cache, all rows pass over it in even
    blocks.

    One block fetches the tile itself a little ahead of its use.  Several fetch the next tile, each its share, so that
    memory is not idle while a tile is used again.
    """
    count = (channels + TILE_CHANNELS - 1) // TILE_CHANNELS
    blocks = (rows + max_rows - 1) // max_rows
    step = TILE_CHANNELS * (bits // 8)
    for number in range(count * thread // threads, count * (thread + 1) // threads):
        channel = number * TILE_CHANNELS
        tile = tiles + number * inputs * step
        for block in range(blocks):
            row, end = rows * block // blocks, rows * (block + 1) // blocks
            multiply_tile(
                bits,
                max_rows,
                registers,
                end - row,
                x + 4 * row * x_stride,
                x_stride,
                tile,
                tile + (_PREFETCH_BYTES if blocks == 1 else inputs * step + inputs * step * block // blocks),
                step // blocks,
                inputs,
                bias + 4 * channel,
                out + (row * channels + channel) * (bits // 8),
                channels,
                channels - channel,
            )


@njit(inline="always")
def _widen(first, last, x, x_stride, wide, inputs):  # type: ignore[no-untyped-def]
    """Some rows of bfloat16 as float32."""
    for row in range(first, last):
        source = carray(uint16s_at(x + 2 * row * x_stride), (inputs,))
        target = carray(float32s_at(wide + 4 * row * (inputs + _WIDE_GAP)), (inputs,))
        for i in range(inputs):
            target[i] = load_bf16(source[i])


def _serial_product(bits: int, max_rows: int, registers: int) -> Any:
    @njit(nogil=True, cache=True)
    def multiply(rows, x, x_stride, wide, tiles, inputs, bias, out, channels):  # type: ignore[no-untyped-def]
        if bits == _BFLOAT16_BITS:
            _widen(0, rows, x, x_stride, wide, inputs)
            x, x_stride = wide, inputs + _WIDE_GAP
        multiply_share(bits, max_rows, registers, 0, 1, rows, x, x_stride, tiles, inputs, bias, out, channels)

    return multiply


def _parallel_product(bits: int, max_rows: int, registers: int) -> Any:
    @njit(nogil=True, cache=True, parallel=True)
    def multiply(threads, rows, x, x_stride, wide, tiles, inputs, bias, out, channels):  # type: ignore[no-untyped-def]
        if bits == _BFLOAT16_BITS:
            if rows * inputs < _SERIAL_WIDENING:
                _widen(0, rows, x, x_stride, wide, inputs)
            else:
                for thread in prange(threads):
                    first, last = rows * thread // threads, rows * (thread + 1) // threads
                    _widen(first, last, x, x_stride, wide, inputs)
            x, x_stride = wide, inputs + _WIDE_GAP
        for thread in prange(threads):
            multiply_share(
                bits, max_rows, registers, thread, threads, rows, x, x_stride, tiles, inputs, bias, out, channels
            )

    return multiply


@njit(nogil=True, cache=True)
def gather_rows(tiles, lanes, channels, ids, rows):  # type: ignore[no-untyped-def]
    """Rows of a packed matrix: tiles [count, inputs, 32], ids int64 [n], rows [n, inputs] of the tiles' dtype.

    lanes [32] says in which column of its tile a channel stands.  False where an id is not below ``channels``.
    """
    for i in range(ids.size):
        if not 0 <= ids[i] < channels:
            return False
        tile, lane = ids[i] // TILE_CHANNELS, lanes[ids[i] % TILE_CHANNELS]
        for k in range(tiles.shape[1]):
            rows[i, k] = tiles[tile, k, lane]
    return True
