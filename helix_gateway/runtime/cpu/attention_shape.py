"""The vocabulary of compiled attention: a layer's shape, a step's plan, and where a sequence's unit lies.

A *tile* is a few consecutive rows of one sequence, and an *item* a tile and some KV heads.  Knows nothing about how keys
and values are stored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from helix_gateway.core.inner_functions import INNER
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


class Plans(NamedTuple):
    """The plans of a step for several kinds of layers, one behind the other; see `Plan`."""

    positions: Int64s
    row_sequence: Int32s
    tables: Int32s
    """[plans, num_seqs, max_blocks]"""
    tile_row: Int32s
    """[plans, most tiles]"""
    tile_tokens: Int32s
    """[plans, most tiles]"""
    parts: Int64s
    """[plans]"""
    bounds: Int64s
    """[plans, threads + 1]"""


def join_plans(plans: Sequence[Plan]) -> Plans:
    """All plans of one step as one; what is shorter than others has zeros behind it."""
    first = plans[0]
    return Plans(
        first.positions,
        first.row_sequence,
        join_padded([plan.tables for plan in plans]),
        join_padded([plan.tile_row for plan in plans]),
        join_padded([plan.tile_tokens for plan in plans]),
        np.array([plan.parts for plan in plans], np.int64),
        join_padded([plan.bounds for plan in plans]),
    )


def join_padded(arrays: Sequence[Any]) -> Any:
    """Arrays of one dtype behind one another; a view where there is one."""
    if len(arrays) == 1:
        return arrays[0][None]
    joined = np.zeros((len(arrays), *np.max([array.shape for array in arrays], axis=0)), arrays[0].dtype)
    for place, array in zip(joined, arrays, strict=True):
        place[tuple(map(slice, array.shape))] = array
    return joined


@njit(cache=True, **INNER)
def plan_of(plans, number):  # type: ignore[no-untyped-def]
    """One of the plans."""
    return Plan(
        plans.positions,
        plans.row_sequence,
        plans.tables[number],
        plans.tile_row[number],
        plans.tile_tokens[number],
        plans.parts[number],
        plans.bounds[number],
    )


@njit(cache=True, **INNER)
def unit_at(shape, offsets, table, unit):  # type: ignore[no-untyped-def]
    """Element at which a sequence's unit begins."""
    runs = shape[RUNS]
    return offsets[unit % runs] + table[unit // runs] * shape[PAGE_STRIDE]


@njit(cache=True, **INNER)
def first_seen(position, window):  # type: ignore[no-untyped-def]
    """The first position that a token attends to."""
    return max(0, position - window + 1)


@njit(cache=True, **INNER)
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


@njit(cache=True, **INNER)
def softcapped(score, softcap):  # type: ignore[no-untyped-def]
    """``softcap * tanh(score / softcap)``."""
    return softcap * _tanh_f32(score / softcap)
