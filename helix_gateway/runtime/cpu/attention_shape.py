"""The vocabulary of compiled attention: a layer's shape, a step's plan, and where a sequence's unit lies.

A *tile* is a few consecutive rows of one sequence, and an *item* a tile and some KV heads.  Knows nothing about how keys
and values are stored.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from helix_gateway.core.step import Int32s
from helix_gateway.runtime.cpu.math import exp_f32
from helix_gateway.runtime.cpu.microkernels import fma
from helix_gateway.runtime.pages import Int64s

PAGE_STRIDE, UNIT, RUNS, KV_HEADS, GROUP, KEY_DIM, VALUE_DIM, WINDOW, QUANTISED = range(9)
"""Places in the array that describes a layer's shape: one array is unpacked faster than nine integers."""


class Plan(NamedTuple):
    """One step's work for one KV group, the same for all its layers."""

    positions: Int64s
    """[num_tokens]"""
    row_sequence: Int32s
    """[num_tokens], row of ``tables``."""
    tables: Int32s
    """[num_seqs, max_blocks]"""
    tile_row: Int32s
    """[num_tiles], the first row of each tile."""
    tile_tokens: Int32s
    """[num_tiles]"""
    parts: int
    """Items that a tile's KV heads are divided among."""
    bounds: Int64s
    """[threads + 1]; thread t takes the items bounds[t]:bounds[t + 1]."""


@njit(cache=True)
def unit_at(shape, offsets, table, unit):  # type: ignore[no-untyped-def]
    """Element at which a sequence's unit begins."""
    runs = shape[RUNS]
    return offsets[unit % runs] + table[unit // runs] * shape[PAGE_STRIDE]


@njit(cache=True)
def first_seen(position, window):  # type: ignore[no-untyped-def]
    """The first position that a token attends to."""
    return max(0, position - window + 1)


@njit(cache=True)
def _tanh_f32(x):  # type: ignore[no-untyped-def]
    """Hyperbolic tangent: an odd polynomial near 0, where the quotient would cancel (the Cephes library's tanhf)."""
    z = x * x
    p = fma(np.float32(-5.70498872745e-3), z, np.float32(2.06390887954e-2))
    p = fma(fma(p, z, np.float32(-5.37397155531e-2)), z, np.float32(1.33314422036e-1))
    p = fma(fma(p, z, np.float32(-3.33332819422e-1)) * z, x, x)
    size = abs(x)
    far = np.float32(1.0) - np.float32(2.0) / (exp_f32(size + size) + np.float32(1.0))
    far = -far if x < np.float32(0.0) else far
    return p if size < np.float32(0.625) else far


@njit(cache=True)
def softcapped(score, softcap):  # type: ignore[no-untyped-def]
    """``softcap * tanh(score / softcap)``."""
    return softcap * _tanh_f32(score / softcap)
