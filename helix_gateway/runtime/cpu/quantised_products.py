"""The compiled products behind quantised weights: float32 rows in, float32 rows out, int8 in between.

Also the way back: rows of a packed matrix as float32, for embeddings and for whoever checks.  Everything is an integer
here, addresses included.  Formats and tiles are those of `quantised_kernels.py`.  Knows nothing about torch.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, prange, types
from numba.extending import intrinsic

from helix_gateway.core.inner_functions import INNER
from helix_gateway.runtime.cpu.dot_products import DOT_PRODUCTS, HOST_DOT
from helix_gateway.runtime.cpu.emitter import F32, F32_BYTES, I8, I16, I64, Emitter
from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS, float32s_at
from helix_gateway.runtime.cpu.quantised_kernels import (
    GROUP_INPUTS,
    INT4,
    INT8,
    INT8_CHANNELS,
    JOINED_GROUPS,
    groups_together,
    multiply_quantised_tile,
    num_passes,
    turn_bytes,
)
from helix_gateway.runtime.cpu.quantised_rows import quantise_row

_DOT = DOT_PRODUCTS[HOST_DOT]
_ROWS_OF_ONE_PASS = max(rows for rows in range(1, _DOT.sums + 1) if num_passes(rows, _DOT) == 1)
FEW_ROWS = _DOT.few_rows
"""Most rows that share one reading of a tile of any format; as code they are one for each number up to it."""
MANY_ROWS = _DOT.sums
"""So many share one of eight bits where there are as many: such a tile may be larger than the nearest cache."""

# One pass alone fetches weights this far ahead; see `products.py`.
_PREFETCH_BYTES = 4096
_GROUP8_BYTES, _GROUP4_BYTES, _PAIR_BYTES = turn_bytes(INT8), turn_bytes(INT4), turn_bytes(INT8_CHANNELS)
_SCALES8, _SCALES4 = GROUP_INPUTS * TILE_CHANNELS, GROUP_INPUTS * TILE_CHANNELS // 2
_PAIR_INPUTS = JOINED_GROUPS * GROUP_INPUTS
_LANES = 16


@njit(inline="always")
def _first_row(block, rows, many, many_rows, few):  # type: ignore[no-untyped-def]
    """The row at which a block begins: ``many`` of ``many_rows`` come first, ``few`` share the rest evenly."""
    if block <= many:
        return block * many_rows
    return many * many_rows + (rows - many * many_rows) * (block - many) // few


def _tiles_of(format_: int, many_rows: int) -> Callable[..., None]:
    """The body of `multiply_tiles` for one format; ``many_rows``: the most that share one reading of a tile."""
    bytes_of_turn, row_bytes = turn_bytes(format_), groups_together(format_) * GROUP_INPUTS

    def multiply_tiles(  # type: ignore[no-untyped-def]
        first, last, rows, x, tiles, tile_bytes, groups, channels, bias, out
    ):
        fields = x + groups * rows * GROUP_INPUTS
        many = rows // many_rows if many_rows > FEW_ROWS else 0
        few = (rows - many * many_rows + FEW_ROWS - 1) // FEW_ROWS
        blocks = many + few
        for number in range(first, last):
            channel, tile = number * TILE_CHANNELS, tiles + number * tile_bytes
            for block in range(blocks):
                row = _first_row(block, rows, many, many_rows, few)
                n = _first_row(block + 1, rows, many, many_rows, few) - row
                # One pass fetches the tile itself, several the next one, each its share; see `products.py`.
                is_alone = rows <= _ROWS_OF_ONE_PASS
                ahead = tile + (_PREFETCH_BYTES if is_alone else tile_bytes + tile_bytes * block // blocks)
                b, to = bias + F32_BYTES * channel, out + F32_BYTES * (row * channels + channel)
                multiply_quantised_tile(
                    format_,
                    HOST_DOT,
                    FEW_ROWS,
                    many_rows,
                    n,
                    x + row * row_bytes,
                    fields + row * F32_BYTES,
                    rows,
                    tile,
                    ahead,
                    bytes_of_turn // blocks,
                    groups,
                    b,
                    to,
                    channels,
                    channels - channel,
                )

    return multiply_tiles


_NUM_TILE_ARGUMENTS = 10


@cache
def tile_kernel(format_: int) -> int:
    """The address of the compiled `multiply_tiles` of a format.

    numba compiles whatever a function calls into that function once more.  This is by far the largest part of all that
    call it, so it is compiled once, for formats that are in use, and called by its address.
    """
    signature = types.void(*[types.int64] * _NUM_TILE_ARGUMENTS)
    many_rows = FEW_ROWS if format_ == INT4 else MANY_ROWS
    kernel: int = cfunc(signature, cache=True)(_tiles_of(format_, many_rows)).address
    return kernel


@intrinsic
def multiply_tiles(typing_context, kernel, first, last, rows, x, weight, bias, out):  # type: ignore[no-untyped-def]
    """Some rows times the tiles first:last, one after the other; rows pass over a tile in blocks.

    kernel: `tile_kernel` of the weight's format; x: address of the quantised rows; weight: (format, address of its tiles,
    bytes of a tile, groups, channels); bias: address of float32; out: address of float32 [rows, channels].
    """

    def emit(context, builder: ir.IRBuilder, signature, args):  # type: ignore[no-untyped-def]
        kernel, *before, weight, bias, out = args
        operands = [*before, *(builder.extract_value(weight, field) for field in range(1, 5)), bias, out]
        function = ir.FunctionType(ir.VoidType(), [I64] * _NUM_TILE_ARGUMENTS)
        builder.call(builder.inttoptr(kernel, function.as_pointer()), operands)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(*[integer] * 5, types.UniTuple(integer, 5), integer, integer), emit


@njit(cache=True, nogil=True, parallel=True)
def quantise_rows(threads, rows, x, groups, joined, out):  # type: ignore[no-untyped-def]
    """Float32 rows [rows, 32 * groups] at x quantised; joined: see `quantise_row`."""
    for thread in prange(threads):
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            quantise_row(x + row * groups * GROUP_INPUTS * F32_BYTES, out, row, rows, groups, joined)


# Not one function with the above: numba joins loops over the same range unless it sees that they share an array, and
# addresses tell it nothing.
@njit(cache=True, nogil=True, parallel=True)
def multiply(threads, kernel, rows, x, weight, bias, out):  # type: ignore[no-untyped-def]
    """All tiles of `multiply_tiles`, each thread some."""
    count = (weight[4] + TILE_CHANNELS - 1) // TILE_CHANNELS
    for thread in prange(threads):
        first, last = count * thread // threads, count * (thread + 1) // threads
        multiply_tiles(kernel, first, last, rows, x, weight, bias, out)


@intrinsic
def _half_at(typing_context, address):  # type: ignore[no-untyped-def]
    """The float16 at an address, as float32."""

    def emit(context, builder: ir.IRBuilder, signature, args):  # type: ignore[no-untyped-def]
        emitter = Emitter(builder)
        return emitter.from_half(emitter.load(args[0], I16, 2))

    return types.float32(types.intp), emit


@intrinsic
def _float_at(typing_context, address):  # type: ignore[no-untyped-def]
    """The float32 at an address."""

    def emit(context, builder: ir.IRBuilder, signature, args):  # type: ignore[no-untyped-def]
        return Emitter(builder).load(args[0], F32)

    return types.float32(types.intp), emit


@intrinsic
def _byte_at(typing_context, address):  # type: ignore[no-untyped-def]
    """The unsigned byte at an address."""

    def emit(context, builder: ir.IRBuilder, signature, args):  # type: ignore[no-untyped-def]
        return Emitter(builder).load(args[0], I8, 1)

    return types.uint8(types.intp), emit


@njit(cache=True, **INNER)
def read_row(weight, channel, inputs, to):  # type: ignore[no-untyped-def]
    """A channel's weights as float32 [inputs] to an address."""
    row = carray(float32s_at(to), (inputs,))
    format_, tiles, tile_bytes, groups, _ = weight
    tile, place = tiles + channel // TILE_CHANNELS * tile_bytes, channel % TILE_CHANNELS
    vector, lane = place // _LANES, place % _LANES
    for k in range(inputs):
        group, quad, byte = k // GROUP_INPUTS, k % GROUP_INPUTS // 4, k % 4
        if format_ == INT8_CHANNELS:
            start = tile + k // _PAIR_INPUTS * _PAIR_BYTES
            at = start + vector * _PAIR_INPUTS * _LANES + k % _PAIR_INPUTS // 4 * 4 * _LANES + lane * 4 + byte
            scale = _float_at(tile + groups // JOINED_GROUPS * _PAIR_BYTES + F32_BYTES * place)
            row[k] = scale * np.float32(np.int32(_byte_at(at)) - 128)
        elif format_ == INT8:
            start = tile + group * _GROUP8_BYTES
            at = start + vector * GROUP_INPUTS * _LANES + quad * 4 * _LANES + lane * 4 + byte
            scale = _half_at(start + _SCALES8 + 2 * place)
            row[k] = scale * np.float32(np.int32(_byte_at(at)) - 128)
        else:
            start = tile + group * _GROUP4_BYTES
            at = start + vector * GROUP_INPUTS // 2 * _LANES + quad % 4 * 4 * _LANES + lane * 4 + byte
            scale, least = _half_at(start + _SCALES4 + 2 * place), _half_at(
                start + _SCALES4 + 2 * TILE_CHANNELS + 2 * place
            )
            row[k] = scale * np.float32(_byte_at(at) >> (quad // 4 * 4) & 15) + least


@njit(cache=True, nogil=True, parallel=True)
def read_rows(threads, weight, channels, inputs, rows):  # type: ignore[no-untyped-def]
    """The given channels (int64) as float32, rows [n, inputs]; they must lie in the matrix."""
    for thread in prange(threads):
        for i in range(len(channels) * thread // threads, len(channels) * (thread + 1) // threads):
            read_row(weight, channels[i], inputs, rows[i].ctypes.data)
