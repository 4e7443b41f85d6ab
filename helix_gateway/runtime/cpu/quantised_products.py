"""The compiled products behind quantised weights: float32 rows in, float32 rows out, int8 in between.

Also the way back: rows of a packed matrix as float32, for embeddings and for whoever checks.  Everything is an integer
here, addresses included.  Formats and tiles are those of `quantised_kernels.py`.  Knows nothing about torch.
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.extending import intrinsic

from helix_gateway.runtime.cpu.dot_products import DOT_PRODUCTS, HOST_DOT
from helix_gateway.runtime.cpu.emitter import F32_BYTES, I8, I16, I64, Emitter
from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS
from helix_gateway.runtime.cpu.quantised_kernels import (
    GROUP_INPUTS,
    INT4,
    INT8,
    group_bytes,
    multiply_quantised_tile,
    rows_of_one_pass,
)
from helix_gateway.runtime.cpu.quantised_rows import quantise_row

_ROWS_OF_ONE_PASS = rows_of_one_pass(DOT_PRODUCTS[HOST_DOT].registers)
FEW_ROWS = _ROWS_OF_ONE_PASS or 4
"""Most rows that share one reading of a tile of any format; as code they are one for each number up to it."""
MANY_ROWS = 2 * _ROWS_OF_ONE_PASS or FEW_ROWS
"""So many share one of `INT8` where there are as many: such a tile may be larger than the nearest cache."""

# One pass alone fetches weights this far ahead; see `products.py`.
_PREFETCH_BYTES = 4096
_GROUP8_BYTES, _GROUP4_BYTES = group_bytes(INT8), group_bytes(INT4)
_SCALES8, _SCALES4 = GROUP_INPUTS * TILE_CHANNELS, GROUP_INPUTS * TILE_CHANNELS // 2
_LANES = 16


@njit(inline="always")
def _first_row(block, rows, many, few):  # type: ignore[no-untyped-def]
    """The row at which a block begins: ``many`` of `MANY_ROWS` come first, ``few`` share the rest evenly."""
    if block <= many:
        return block * MANY_ROWS
    return many * MANY_ROWS + (rows - many * MANY_ROWS) * (block - many) // few


def _multiply_tiles(  # type: ignore[no-untyped-def]
    first, last, rows, x, x_stride, format_, tiles, tile_bytes, groups, channels, bias, out
):
    """The compiled body of `multiply_tiles`."""
    many = rows // MANY_ROWS if format_ == INT8 and MANY_ROWS > FEW_ROWS else 0
    few = (rows - many * MANY_ROWS + FEW_ROWS - 1) // FEW_ROWS
    blocks, step = many + few, _GROUP8_BYTES if format_ == INT8 else _GROUP4_BYTES
    for number in range(first, last):
        channel, tile = number * TILE_CHANNELS, tiles + number * tile_bytes
        for block in range(blocks):
            row, end = _first_row(block, rows, many, few), _first_row(block + 1, rows, many, few)
            n, a, left = end - row, x + row * x_stride, channels - channel
            # One pass fetches the tile itself, several the next one, each its share; see `products.py`.
            is_alone = rows <= _ROWS_OF_ONE_PASS
            ahead = tile + (_PREFETCH_BYTES if is_alone else tile_bytes + tile_bytes * block // blocks)
            pace, b, to = step // blocks, bias + F32_BYTES * channel, out + F32_BYTES * (row * channels + channel)
            if block < many:
                multiply_quantised_tile(
                    INT8,
                    HOST_DOT,
                    MANY_ROWS,
                    MANY_ROWS,
                    n,
                    a,
                    x_stride,
                    tile,
                    ahead,
                    pace,
                    groups,
                    b,
                    to,
                    channels,
                    left,
                )
            elif format_ == INT8:
                multiply_quantised_tile(
                    INT8, HOST_DOT, 1, FEW_ROWS, n, a, x_stride, tile, ahead, pace, groups, b, to, channels, left
                )
            else:
                multiply_quantised_tile(
                    INT4, HOST_DOT, 1, FEW_ROWS, n, a, x_stride, tile, ahead, pace, groups, b, to, channels, left
                )


_NUM_TILE_ARGUMENTS = 12


@cache
def tile_kernel() -> int:
    """The address of the compiled `_multiply_tiles`.

    numba compiles whatever a function calls into that function once more.  This is by far the largest part of all that
    call it, so it is compiled once, and called by its address.
    """
    signature = types.void(*[types.int64] * _NUM_TILE_ARGUMENTS)
    kernel: int = cfunc(signature, cache=True)(_multiply_tiles).address
    return kernel


@intrinsic
def multiply_tiles(typing_context, kernel, first, last, rows, x, x_stride, weight, bias, out):  # type: ignore[no-untyped-def]
    """Some rows times the tiles first:last, one after the other; rows pass over a tile in blocks.

    kernel: `tile_kernel`; x: records, ``x_stride`` bytes apart; weight: (format, address of its tiles, bytes of a tile,
    groups, channels); bias: address of float32; out: address of float32 [rows, channels].
    """

    def emit(context, builder: ir.IRBuilder, signature, args):  # type: ignore[no-untyped-def]
        kernel, *before, weight, bias, out = args
        operands = [*before, *(builder.extract_value(weight, field) for field in range(5)), bias, out]
        function = ir.FunctionType(ir.VoidType(), [I64] * _NUM_TILE_ARGUMENTS)
        builder.call(builder.inttoptr(kernel, function.as_pointer()), operands)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(*[integer] * 6, types.UniTuple(integer, 5), integer, integer), emit


@njit(cache=True, nogil=True, parallel=True)
def quantise_rows(threads, rows, x, groups, records, x_stride):  # type: ignore[no-untyped-def]
    """Records, ``x_stride`` bytes apart, of float32 rows [rows, 32 * groups] at x."""
    for thread in prange(threads):
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            quantise_row(x + row * groups * GROUP_INPUTS * F32_BYTES, records + row * x_stride, groups)


# Not one function with the above: numba joins loops over the same range unless it sees that they share an array, and
# addresses tell it nothing.
@njit(cache=True, nogil=True, parallel=True)
def multiply(threads, kernel, rows, records, x_stride, weight, bias, out):  # type: ignore[no-untyped-def]
    """All tiles of `multiply_tiles`, each thread some."""
    count = (weight[4] + TILE_CHANNELS - 1) // TILE_CHANNELS
    for thread in prange(threads):
        first, last = count * thread // threads, count * (thread + 1) // threads
        multiply_tiles(kernel, first, last, rows, records, x_stride, weight, bias, out)


@intrinsic
def _half_at(typing_context, address):  # type: ignore[no-untyped-def]
    """The float16 at an address, as float32."""

    def emit(context, builder: ir.IRBuilder, signature, args):  # type: ignore[no-untyped-def]
        emitter = Emitter(builder)
        return emitter.from_half(emitter.load(args[0], I16, 2))

    return types.float32(types.intp), emit


@intrinsic
def _byte_at(typing_context, address):  # type: ignore[no-untyped-def]
    """The unsigned byte at an address."""

    def emit(context, builder: ir.IRBuilder, signature, args):  # type: ignore[no-untyped-def]
        return Emitter(builder).load(args[0], I8, 1)

    return types.uint8(types.intp), emit


@njit(cache=True)
def read_row(weight, channel, inputs, row):  # type: ignore[no-untyped-def]
    """A channel's weights as float32 into ``row`` (an array, at least ``inputs`` long)."""
    format_, tiles, tile_bytes, _, _ = weight
    tile, place = tiles + channel // TILE_CHANNELS * tile_bytes, channel % TILE_CHANNELS
    vector, lane = place // _LANES, place % _LANES
    for k in range(inputs):
        group, quad, byte = k // GROUP_INPUTS, k % GROUP_INPUTS // 4, k % 4
        if format_ == INT8:
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
            read_row(weight, channels[i], inputs, rows[i])
