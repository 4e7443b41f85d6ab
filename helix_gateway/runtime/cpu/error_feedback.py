"""Four bits of a matrix whose inputs are known: what rounding one weight costs, the weights after it make up for.

The error that counts is that of a layer's answers, so of weights it is weighed by the second moments of the layer's inputs.
Group by group of 32 inputs, steps are chosen one after the other, and what each is off by is taken over by all inputs that
come later, as far as they go along with it (GPTQ: Frantar et al. 2023, algorithm 1; scale and minimum of a group are fitted
when its turn comes).  Then every group is gone through again with all others as they are: scale and minimum by least
squares, steps by coordinate descent; neither can make the error larger.  Knows nothing about models or how steps are packed.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange

from helix_gateway.core.inner_functions import INNER
from helix_gateway.core.step import Float32s
from helix_gateway.runtime.cpu.four_bits import DISTANCES, LANES, LARGEST, as_float16
from helix_gateway.runtime.cpu.quantised_kernels import GROUP_INPUTS

_ZERO, _ONE, _TOP = np.float32(0.0), np.float32(1.0), np.float32(LARGEST)
_DAMPING = 0.01
"""Of the mean second moment, added to each: a text tells less about inputs that it hardly has than its moments claim (0.001 to
0.05 measured alike)."""
_PASSES = 2
"""Through all groups, once steps are chosen; later ones change little."""
_BLOCK_INPUTS = 256
"""Of second moments that are computed at a time: nothing is computed twice for symmetry, but in a block's own square."""


class Moments(NamedTuple):
    """What is known of a layer's inputs."""

    second: torch.Tensor
    """[inputs, inputs], damped: the mean of products of inputs."""
    feedback: torch.Tensor
    """[inputs, inputs], upper triangular; its square (transposed times itself) is the inverse of `second`."""


def moments_of(inputs: torch.Tensor) -> Moments:
    """Of a layer's inputs, float32 [tokens, inputs]."""
    width = inputs.shape[1]
    second = torch.empty(width, width)
    for first in range(0, width, _BLOCK_INPUTS):
        block = slice(first, min(first + _BLOCK_INPUTS, width))
        torch.mm(inputs[:, block].T, inputs[:, : block.stop], out=second[block, : block.stop])
        second[:first, block] = second[block, :first].T
    second /= max(1, len(inputs))
    mean = float(second.diagonal().double().mean())
    second.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    # The inverse of an upper factor: of Cholesky's of the inputs in reverse order, reversed.
    lower = torch.linalg.cholesky(second.double().flip(0, 1))
    feedback = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(width, dtype=torch.float64), upper=True)
    return Moments(second, feedback.float().contiguous())


class FourBits(NamedTuple):
    """A matrix [channels, inputs] in four bits."""

    steps: Float32s
    """[channels, inputs], whole numbers from 0 to 15."""
    scales: Float32s
    """[channels, groups]; these and the minima are numbers that a float16 holds."""
    minima: Float32s
    """[channels, groups]"""

    def values(self) -> Float32s:
        """The matrix."""
        channels, groups = self.scales.shape
        steps = self.steps.reshape(channels, groups, GROUP_INPUTS)
        values: Float32s = (steps * self.scales[..., None] + self.minima[..., None]).reshape(channels, -1)
        return values


def round_with_feedback(threads: int, weights: torch.Tensor, moments: Moments) -> FourBits:
    """Four bits of a contiguous float32 matrix [channels, inputs], of whole groups of inputs."""
    channels, inputs = weights.shape
    groups = inputs // GROUP_INPUTS
    shape, out = (channels, groups), np.zeros((channels, inputs), np.float32)
    found = FourBits(out, np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    _choose(threads, weights.clone(), moments.feedback, found)
    for _ in range(_PASSES):
        _descend(threads, weights, moments.second, found)
    return found


def _choose(threads: int, left: torch.Tensor, feedback: torch.Tensor, found: FourBits) -> None:
    """Steps, group by group; ``left``: the weights, which are changed as they take over errors."""
    errors = torch.empty(len(left), GROUP_INPUTS)
    diagonal = feedback.diagonal().numpy().copy()
    for first in range(0, left.shape[1], GROUP_INPUTS):
        last = first + GROUP_INPUTS
        square = np.ascontiguousarray(feedback[first:last, first:last].numpy())
        _choose_group(threads, left.numpy(), first, square, diagonal[first:last], *found, errors.numpy())
        left[:, last:].addmm_(errors, feedback[first:last, last:], alpha=-1)


def _descend(threads: int, weights: torch.Tensor, second: torch.Tensor, found: FourBits) -> None:
    """Once through all groups; every one is bettered with the others as they are."""
    slopes = (weights - torch.from_numpy(found.values())) @ second
    changes = torch.empty(len(weights), GROUP_INPUTS)
    for first in range(0, weights.shape[1], GROUP_INPUTS):
        last = first + GROUP_INPUTS
        square = np.ascontiguousarray(second[first:last, first:last].numpy())
        _better_group(threads, slopes.numpy(), first, square, *found, changes.numpy())
        slopes.addmm_(changes, second[first:last], alpha=-1)


@njit(cache=True, **INNER)
def _with_feedback(weights, square, scales, minima, steps, errors, losses):  # type: ignore[no-untyped-def]
    """Steps of a group for scales and minima that are given; weights [32, lanes] take over what earlier ones lose.

    errors: what each is off by, in units of its own freedom (the diagonal of ``square``); their squares add up to losses.
    """
    losses[:] = _ZERO
    for i in range(GROUP_INPUTS):
        inverse = _ONE / square[i, i]
        for lane in range(LANES):
            scale = scales[lane]
            step = np.rint((weights[i, lane] - minima[lane]) / scale) if scale > _ZERO else _ZERO
            steps[i, lane] = min(max(step, _ZERO), _TOP)
            error = (weights[i, lane] - (steps[i, lane] * scale + minima[lane])) * inverse
            errors[i, lane] = error
            losses[lane] += error * error
        for j in range(i + 1, GROUP_INPUTS):
            for lane in range(LANES):
                weights[j, lane] -= errors[i, lane] * square[i, j]


@njit(cache=True)
def _fit(weights, distance, least, span, diagonal, scales, minima):  # type: ignore[no-untyped-def]
    """Scales and minima of least squares for the steps nearest at a distance, weighed by each input's freedom."""
    for lane in range(LANES):
        inverse = distance / span[lane] if span[lane] > _ZERO else _ZERO
        count, total, squares, sums, products = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
        for i in range(GROUP_INPUTS):
            weight = _ONE / (diagonal[i] * diagonal[i])
            step = min(max(np.rint((weights[i, lane] - least[lane]) * inverse), _ZERO), _TOP)
            count += weight
            total += weight * step
            squares += weight * step * step
            sums += weight * weights[i, lane]
            products += weight * step * weights[i, lane]
        spread = squares - total * total / count
        scale = (products - total * sums / count) / spread if spread > _ZERO else _ZERO
        scales[lane] = as_float16(scale)
        minima[lane] = as_float16((sums - scale * total) / count)


@njit(cache=True, **INNER)
def _search(weights, square, diagonal, room, steps, errors, best_steps, best_errors):  # type: ignore[no-untyped-def]
    """The best scales and minima of 64 channels of a group, room[:2], and their steps and errors."""
    scales, minima, least, span, losses, tried, tried_minima = (
        room[0],
        room[1],
        room[2],
        room[3],
        room[4],
        room[5],
        room[6],
    )
    for lane in range(LANES):
        least[lane] = weights[:, lane].min()
        span[lane] = weights[:, lane].max() - least[lane]
    best_losses = np.full(LANES, np.inf, np.float32)
    copy = np.empty_like(weights)
    for distance in DISTANCES:
        _fit(weights, distance, least, span, diagonal, tried, tried_minima)
        copy[:] = weights
        _with_feedback(copy, square, tried, tried_minima, steps, errors, losses)
        for lane in range(LANES):
            if losses[lane] < best_losses[lane]:
                best_losses[lane], scales[lane], minima[lane] = losses[lane], tried[lane], tried_minima[lane]
                best_steps[:, lane] = steps[:, lane]
                best_errors[:, lane] = errors[:, lane]


@njit(cache=True, parallel=True)
def _choose_group(threads, left, first, square, diagonal, all_steps, scales, minima, errors):  # type: ignore[no-untyped-def]
    """One group of all channels, whose weights are left[:, first:first + 32]."""
    blocks = (len(left) + LANES - 1) // LANES
    for thread in prange(threads):
        lanes = np.zeros((5, GROUP_INPUTS, LANES), np.float32)
        room = np.zeros((7, LANES), np.float32)
        for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
            start = block * LANES
            stop = min(start + LANES, len(left))
            count = stop - start
            lanes[0, :, :count] = left[start:stop, first : first + GROUP_INPUTS].T
            _search(lanes[0], square, diagonal, room, lanes[1], lanes[2], lanes[3], lanes[4])
            all_steps[start:stop, first : first + GROUP_INPUTS] = lanes[3, :, :count].T
            errors[start:stop] = lanes[4, :, :count].T
            scales[start:stop, first // GROUP_INPUTS] = room[0, :count]
            minima[start:stop, first // GROUP_INPUTS] = room[1, :count]


@njit(cache=True, **INNER)
def _refit(slopes, square, steps, scales, minima, moved):  # type: ignore[no-untyped-def]
    """Better scales and minima for the steps as they are; slopes [32, lanes] follow.  moved: room for [32, lanes]."""
    rows = np.zeros(GROUP_INPUTS, np.float32)
    whole = _ZERO
    moved[:] = _ZERO
    for i in range(GROUP_INPUTS):
        for j in range(GROUP_INPUTS):
            rows[i] += square[i, j]
            for lane in range(LANES):
                moved[i, lane] += square[i, j] * steps[j, lane]
        whole += rows[i]
    for lane in range(LANES):
        both, cross, along, sums = _ZERO, _ZERO, _ZERO, _ZERO
        for i in range(GROUP_INPUTS):
            both += steps[i, lane] * moved[i, lane]
            cross += steps[i, lane] * rows[i]
            along += steps[i, lane] * slopes[i, lane]
            sums += slopes[i, lane]
        size = both * whole - cross * cross
        if size <= _ZERO:
            continue
        scale = as_float16(scales[lane] + (along * whole - sums * cross) / size)
        minimum = as_float16(minima[lane] + (sums * both - along * cross) / size)
        by, up = scale - scales[lane], minimum - minima[lane]
        change = by * by * both + np.float32(2.0) * by * up * cross + up * up * whole
        if scale > _ZERO and change < np.float32(2.0) * (by * along + up * sums):
            scales[lane], minima[lane] = scale, minimum
            for i in range(GROUP_INPUTS):
                slopes[i, lane] -= by * moved[i, lane] + up * rows[i]


@njit(cache=True, **INNER)
def _step_along(slopes, square, steps, scales):  # type: ignore[no-untyped-def]
    """Each step in turn to where the error is least with all else as it is; slopes [32, lanes] follow."""
    change = np.empty(LANES, np.float32)
    for i in range(GROUP_INPUTS):
        inverse = _ONE / square[i, i]
        for lane in range(LANES):
            scale = scales[lane]
            wanted = steps[i, lane] + (np.rint(slopes[i, lane] * inverse / scale) if scale > _ZERO else _ZERO)
            step = min(max(wanted, _ZERO), _TOP)
            change[lane] = (step - steps[i, lane]) * scale
            steps[i, lane] = step
        for j in range(GROUP_INPUTS):
            for lane in range(LANES):
                slopes[j, lane] -= change[lane] * square[i, j]


@njit(cache=True, parallel=True)
def _better_group(threads, slopes, first, square, all_steps, scales, minima, changes):  # type: ignore[no-untyped-def]
    """One group of all channels, whose slopes (how the error falls along each weight) are slopes[:, first:first + 32].

    changes [channels, 32]: by how much its values have become others.
    """
    blocks, group = (len(slopes) + LANES - 1) // LANES, first // GROUP_INPUTS
    for thread in prange(threads):
        lanes = np.zeros((3, GROUP_INPUTS, LANES), np.float32)
        own, steps = lanes[0], lanes[1]
        room = np.zeros((2, LANES), np.float32)
        for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
            start = block * LANES
            stop = min(start + LANES, len(slopes))
            count = stop - start
            own[:, :count] = slopes[start:stop, first : first + GROUP_INPUTS].T
            steps[:, :count] = all_steps[start:stop, first : first + GROUP_INPUTS].T
            room[0, :count], room[1, :count] = scales[start:stop, group], minima[start:stop, group]
            before = steps * room[0] + room[1]
            _refit(own, square, steps, room[0], room[1], lanes[2])
            _step_along(own, square, steps, room[0])
            changes[start:stop] = (steps * room[0] + room[1] - before)[:, :count].T
            all_steps[start:stop, first : first + GROUP_INPUTS] = steps[:, :count].T
            scales[start:stop, group], minima[start:stop, group] = room[0, :count], room[1, :count]


def as_blocks(found: FourBits) -> npt.NDArray[np.uint8]:
    """GGUF's Q4_1: [channels, groups, 20]; see `Int4Weight.from_blocks`."""
    channels, groups = found.scales.shape
    halves = found.steps.astype(np.uint8).reshape(channels, groups, 2, GROUP_INPUTS // 2)
    numbers = np.stack([found.scales, found.minima], axis=-1).astype(np.float16).view(np.uint8)
    return np.concatenate([numbers, halves[:, :, 0] | halves[:, :, 1] << 4], axis=-1)
