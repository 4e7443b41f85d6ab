"""The scale and the minimum with which groups of 32 weights lose least when they become 16 steps.

The least and the largest weight of a group as the first and the last step are seldom best: steps a little closer together
serve the many at the cost of the few outermost.  So some distances are tried; for the steps that each gives, scale and minimum
follow by least squares, and what leaves the smallest squared error is taken (measured: half of what rounding between the
extremes costs in perplexity, `docs/log.md`).  Knows nothing about how steps are packed.
"""

import numpy as np
from numba import njit, prange

from helix_gateway.core.inner_functions import INNER
from helix_gateway.core.step import Float32s
from helix_gateway.runtime.cpu.quantised_kernels import GROUP_INPUTS

LARGEST = 15
"""The last step."""
# What a group's range is divided into, from a little less than its extremes need to steps that leave out the outermost.
DISTANCES = tuple(np.float32(LARGEST + 0.35 * tried) for tried in range(-2, 10))
# Groups that are worked on together: the lanes of all that follows, so that no sum depends on vectors.
LANES = 64
_ZERO, _TOP, _COUNT = np.float32(0.0), np.float32(LARGEST), np.float32(GROUP_INPUTS)


@njit(cache=True, **INNER)
def _steps(weights, minima, inverses, steps):  # type: ignore[no-untyped-def]
    """The nearest steps of weights [32, lanes]."""
    for i in range(GROUP_INPUTS):
        for lane in range(LANES):
            step = np.rint((weights[i, lane] - minima[lane]) * inverses[lane])
            steps[i, lane] = min(max(step, _ZERO), _TOP)


@njit(cache=True, **INNER)
def _fit(weights, steps, scales, minima):  # type: ignore[no-untyped-def]
    """Scales and minima of least squares for given steps; a group whose steps are all one is its mean."""
    for lane in range(LANES):
        total, squares, products, mean = _ZERO, _ZERO, _ZERO, _ZERO
        for i in range(GROUP_INPUTS):
            total += steps[i, lane]
            squares += steps[i, lane] * steps[i, lane]
            products += steps[i, lane] * weights[i, lane]
            mean += weights[i, lane] / _COUNT
        spread = squares - total * total / _COUNT
        scales[lane] = (products - total * mean) / spread if spread > _ZERO else _ZERO
        minima[lane] = mean - scales[lane] * total / _COUNT


@njit(cache=True, **INNER)
def _error(weights, steps, scales, minima, lane):  # type: ignore[no-untyped-def]
    total = _ZERO
    for i in range(GROUP_INPUTS):
        off = steps[i, lane] * scales[lane] + minima[lane] - weights[i, lane]
        total += off * off
    return total


@njit(cache=True, **INNER)
def as_float16(number):  # type: ignore[no-untyped-def]
    """To the 11 bits of a float16 (Dekker 1971, splitting)."""
    scaled = number * np.float32(2**13 + 1)
    return scaled - (scaled - number)


@njit(cache=True, **INNER)
def _keep_better(weights, steps, inverses, tried, best):  # type: ignore[no-untyped-def]
    """Where the scales and minima that are tried, as they will be stored, leave a smaller error, they are the best."""
    for lane in range(LANES):
        tried[0, lane], tried[1, lane] = as_float16(tried[0, lane]), as_float16(tried[1, lane])
        inverses[lane] = np.float32(1.0) / tried[0, lane] if tried[0, lane] > _ZERO else _ZERO
    _steps(weights, tried[1], inverses, steps)
    for lane in range(LANES):
        error = _error(weights, steps, tried[0], tried[1], lane)
        if error < best[2, lane]:
            best[0, lane], best[1, lane], best[2, lane] = tried[0, lane], tried[1, lane], error


@njit(cache=True, **INNER)
def _search(weights, steps, inverses, tried, best):  # type: ignore[no-untyped-def]
    """The best scales, minima and errors (`best`) of 64 groups; tried: room for those of one distance."""
    least, span = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for lane in range(LANES):
        least[lane] = weights[:, lane].min()
        span[lane] = weights[:, lane].max() - least[lane]
        best[0, lane], best[1, lane], best[2, lane] = _ZERO, least[lane], np.inf
        tried[0, lane], tried[1, lane] = span[lane] / _TOP, least[lane]
    # What lies on a grid already, least squares might move by a last bit.
    _keep_better(weights, steps, inverses, tried, best)
    for distance in DISTANCES:
        for lane in range(LANES):
            inverses[lane] = distance / span[lane] if span[lane] > _ZERO else _ZERO
        _steps(weights, least, inverses, steps)
        _fit(weights, steps, tried[0], tried[1])
        _keep_better(weights, steps, inverses, tried, best)


@njit(cache=True, parallel=True)
def _search_all(threads, groups, scales, minima):  # type: ignore[no-untyped-def]
    blocks = (len(groups) + LANES - 1) // LANES
    for thread in prange(threads):
        both = np.zeros((2, GROUP_INPUTS, LANES), np.float32)
        weights, steps = both[0], both[1]
        room = np.zeros((6, LANES), np.float32)
        inverses, tried, best = room[0], room[1:3], room[3:]
        for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
            first = block * LANES
            count = min(LANES, len(groups) - first)
            weights[:, :count] = groups[first : first + count].T
            _search(weights, steps, inverses, tried, best)
            scales[first : first + count] = best[0, :count]
            minima[first : first + count] = best[1, :count]


def best_scales(threads: int, groups: Float32s) -> tuple[Float32s, Float32s]:
    """Scales and minima, float32 [n] each, of groups of weights, contiguous float32 [n, 32]."""
    scales, minima = np.empty(len(groups), np.float32), np.empty(len(groups), np.float32)
    _search_all(threads, groups, scales, minima)
    return scales, minima
