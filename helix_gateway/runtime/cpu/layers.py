"""All layers of a Llama-like model as one compiled call: norms, products, rotary, attention and gate, in float32 sums.

Through transformers' modules a step of a small model is mostly Python between short products; here there is none.
The residual stream and all activations stay float32, products and attention are those of `products.py` and
`attention.py`, so a row's bits depend on its own sequence alone.  Which models this fits, `compiled_steps.py` says.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, prange

from helix_gateway.core.inner_functions import INNER
from helix_gateway.core.step import Float32s
from helix_gateway.runtime.cpu.attention import NO_SOFTCAP, UniformLayers
from helix_gateway.runtime.cpu.attention_items import attend_item, write_rows
from helix_gateway.runtime.cpu.attention_kernels import load_element
from helix_gateway.runtime.cpu.attention_shape import GROUP, KEY_DIM, KV_HEADS, Plan
from helix_gateway.runtime.cpu.math import exp_f32
from helix_gateway.runtime.cpu.microkernels import float32s_at
from helix_gateway.runtime.cpu.products import BlockShape, multiply_share
from helix_gateway.runtime.cpu.rotating import rotate_rows
from helix_gateway.runtime.pages import Int64s

QKV, OUT, GATE_UP, DOWN = range(4)
"""The products of a layer, in their order."""
FIELDS = 10
"""Addresses that describe a layer: tiles and bias of each product, then the weights of the two norms."""
_NORMS = 8

_ONE = np.float32(1.0)
# Numbers of an element-wise stage below which a parallel region costs more than it saves.
_SERIAL = 1 << 13


@njit(cache=True)
def norm_row(hidden, weight, eps, out):  # type: ignore[no-untyped-def]
    """Root-mean-square norm of one row (Zhang and Sennrich 2019), summed in eight chains whatever else is computed."""
    size = len(hidden)
    sums = np.zeros(8, np.float32)
    for i in range(0, size // 8 * 8, 8):
        for lane in range(8):
            sums[lane] += hidden[i + lane] * hidden[i + lane]
    for i in range(size // 8 * 8, size):
        sums[0] += hidden[i] * hidden[i]
    total = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]))
    scale = _ONE / np.sqrt(total / np.float32(size) + eps)
    for i in range(size):
        out[i] = weight[i] * (hidden[i] * scale)


@njit(cache=True, **INNER)
def _add_row(kind, hidden, address):  # type: ignore[no-untyped-def]
    """Add a product's row to the residual stream."""
    for i in range(len(hidden)):
        hidden[i] += load_element(kind, address + i * kind.itemsize)


@njit(cache=True, **INNER)
def gate_row(kind, address, count, out):  # type: ignore[no-untyped-def]
    """``silu(gate) * up`` of a row that holds ``count`` gates, then as many ups (Shazeer 2020)."""
    for i in range(count):
        gate = load_element(kind, address + i * kind.itemsize)
        up = load_element(kind, address + (count + i) * kind.itemsize)
        out[i] = gate / (_ONE + exp_f32(-gate)) * up


@njit(cache=True, **INNER)
def _widen_row(kind, address, count, out):  # type: ignore[no-untyped-def]
    for i in range(count):
        out[i] = load_element(kind, address + i * kind.itemsize)


@njit(cache=True, **INNER)
def _prepare(kind, stage, number, first, last, layer, eps, hidden, wide, product, attended, inputs):  # type: ignore[no-untyped-def]
    """The input of one product for some rows: residual and norm, attention's output, or the gate."""
    width = hidden.shape[1]
    for row in range(first, last):
        if stage == OUT:
            _widen_row(kind, attended + row * inputs * kind.itemsize, inputs, wide[row])
        elif stage == DOWN:
            gate_row(kind, product + 2 * row * inputs * kind.itemsize, inputs, wide[row])
        else:
            if stage == GATE_UP or number > 0:
                _add_row(kind, hidden[row], product + row * width * kind.itemsize)
            norm = carray(float32s_at(layer[_NORMS + stage // 2]), (width,))
            norm_row(hidden[row], norm, eps, wide[row])


@njit(cache=True, **INNER)
def place_rows(kind, first, last, plan, pages, number, product, channels, cosines, sines):  # type: ignore[no-untyped-def]
    """Of the rows first:last, queries and keys rotated in place, keys and values written into a layer's pages."""
    shape = pages.shape
    kv_heads, dim, size = shape[KV_HEADS], shape[KEY_DIM], kind.itemsize
    heads = kv_heads * shape[GROUP]
    rotate_rows(kind, first, last, product, channels, heads + kv_heads, dim, plan.positions, cosines, sines)
    key = (product + heads * dim * size, channels, dim)
    value = (product + (heads + kv_heads) * dim * size, channels, dim)
    write_rows(kind, pages.stored, shape, pages.offsets[number], plan, first, last, key, value)


@njit(cache=True, **INNER)
def _write_share(kind, thread, threads, plan, pages, number, product, channels, cosines, sines):  # type: ignore[no-untyped-def]
    """A thread's share of the rows."""
    rows = len(plan.positions)
    first, last = rows * thread // threads, rows * (thread + 1) // threads
    place_rows(kind, first, last, plan, pages, number, product, channels, cosines, sines)


@njit(cache=True, **INNER)
def _attend_share(kind, thread, plan, pages, number, product, channels, scaling, attended):  # type: ignore[no-untyped-def]
    """A thread's share of the items."""
    query = (product, channels, pages.shape[KEY_DIM])
    offsets, cap = pages.offsets[number], np.float32(NO_SOFTCAP)
    for item in range(plan.bounds[thread], plan.bounds[thread + 1]):
        attend_item(
            kind, pages.stored, pages.shape, offsets, plan, item, query, scaling, cap, attended, pages.works[thread]
        )


class UniformPages(NamedTuple):
    """What `place_rows` reads of its pages, for whoever has layers of several shapes."""

    stored: Any
    shape: Int64s
    offsets: Int64s


class Scratch(NamedTuple):
    """Memory of one step; `product` and `attended` are addresses, of numbers of the weights' dtype."""

    kind: Any
    """An empty array of the weights' dtype (uint16 for bfloat16)."""
    wide: Float32s
    """[rows, at least the most inputs of a product]"""
    product: int
    """[rows, the most channels of a product]"""
    attended: int
    """[rows, query heads * head dimension]"""


class Angles(NamedTuple):
    """The rotary tables, [kinds, positions, rotated dimensions] each."""

    cosines: Float32s
    sines: Float32s


class Weights(NamedTuple):
    """What stays the same from step to step."""

    layers: Int64s
    """[num_layers, FIELDS]"""
    sizes: Int64s
    """[4, 2], inputs and channels of each product."""
    scaling: float
    """Factor of attention's scores."""
    eps: np.float32
    """Of the norms."""


Run = Callable[[int, Plan, UniformLayers, Weights, Float32s, Scratch, Angles], None]
"""``run(threads, plan, pages, weights, hidden, scratch, angles)``: hidden [rows, width] goes through all layers."""


@cache
def compiled_layers(bits: int, shape: BlockShape) -> Run:
    """The layers for weights of 32 (float32) or 16 (bfloat16) bits; compiled at their first call."""
    run: Run = _layers(bits, shape.max_rows, shape.registers)
    return run


# Closures hold integers alone, as in `products.py`.


def _layers(bits: int, max_rows: int, registers: int) -> Any:
    @njit(nogil=True, cache=True, parallel=True)
    def run(threads, plan, pages, weights, hidden, scratch, angles):  # type: ignore[no-untyped-def]
        sizes, eps, (kind, wide, product, attended) = weights.sizes, weights.eps, scratch
        rows, qkv = hidden.shape[0], sizes[QKV, 1]
        for number in range(weights.layers.shape[0]):
            layer = weights.layers[number]
            for stage in range(4):
                inputs, channels = sizes[stage, 0], sizes[stage, 1]
                if stage == OUT:
                    for thread in prange(threads):
                        _write_share(
                            kind, thread, threads, plan, pages, number, product, qkv, angles.cosines[0], angles.sines[0]
                        )
                    for thread in prange(threads):
                        _attend_share(kind, thread, plan, pages, number, product, qkv, weights.scaling, attended)
                if rows * inputs < _SERIAL:
                    _prepare(kind, stage, number, 0, rows, layer, eps, hidden, wide, product, attended, inputs)
                else:
                    for thread in prange(threads):
                        first, last = rows * thread // threads, rows * (thread + 1) // threads
                        _prepare(kind, stage, number, first, last, layer, eps, hidden, wide, product, attended, inputs)
                tiles, bias, x, x_stride = layer[2 * stage], layer[2 * stage + 1], wide.ctypes.data, wide.shape[1]
                for thread in prange(threads):
                    multiply_share(
                        bits,
                        max_rows,
                        registers,
                        thread,
                        threads,
                        rows,
                        x,
                        x_stride,
                        tiles,
                        inputs,
                        bias,
                        product,
                        channels,
                    )
        for row in range(rows):
            _add_row(kind, hidden[row], product + row * hidden.shape[1] * kind.itemsize)

    return run
