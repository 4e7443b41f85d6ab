"""Numbers of 16 bits times stored bytes: exact in every kind of processor's instructions, for as many as sums hold."""

import numpy as np
import pytest
from numba import njit, types
from numba.extending import intrinsic

from helix_gateway.runtime.cpu.emitter import I32, I32S, Emitter
from helix_gateway.runtime.cpu.instruction_sets import target_features
from helix_gateway.runtime.cpu.integer_dot import DOTS, usable_dots
from helix_gateway.runtime.cpu.wide_products import PLANES, TOP_16, _ByBytes, _ByPairs

KINDS = {f"bytes, {dot}": _ByBytes(dot, 2, 6) for dot in usable_dots() if dot in DOTS}
if "avx2" in target_features():
    KINDS["pairs"] = _ByPairs()


def compiled(kind):
    """``add(numbers, stored, planes, sums)``: 16 int32 and [4, 16, 4] bytes, whose words take one plane's word after another."""

    @intrinsic
    def put(typing_context, numbers, planes):
        def emit(context, builder, signature, args):
            emitter = Emitter(builder)
            *bytes_, _ = kind.planes(emitter, emitter.load(args[0], I32S))
            for place, plane in enumerate(bytes_):
                emitter.store(plane, emitter.offset(args[1], 16 * place), 1)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), emit

    @intrinsic
    def take(typing_context, planes, stored, sums):
        def emit(context, builder, signature, args):
            emitter = Emitter(builder)
            places = [emitter.offset(args[2], 64 * number) for number in range(kind.num_sums)]
            totals = [emitter.load(place, I32S) for place in places]
            for word in range(4):
                at = (emitter.offset(args[0], 16 * plane + 4 * word) for plane in range(PLANES))
                words = [emitter.splat(emitter.load(place, I32)) for place in at]
                taken = kind.taken(emitter, emitter.load(emitter.offset(args[1], 64 * word), I32S))
                totals = kind.add(emitter, totals, taken, words)
            for place, total in zip(places, totals):
                emitter.store(total, place)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp), emit

    @njit
    def add(numbers, stored, planes, sums):
        put(numbers.ctypes.data, planes.ctypes.data)
        take(planes.ctypes.data, stored.ctypes.data, sums.ctypes.data)

    return add


def total_of(kind, add, numbers, stored, start=0):
    """What sixteens of numbers times bytes [sixteens, 4, 16, 4] come to in each lane."""
    sums = np.zeros((PLANES, 16), np.int32)
    sums[0] = start
    for own, bytes_ in zip(numbers, stored):
        add(own, np.ascontiguousarray(bytes_), np.zeros((PLANES, 16), np.uint8), sums)
    return kind.first_worth * sums[0].astype(np.int64) + (sums[1] if kind.num_sums == PLANES else 0)


def wanted(numbers, stored, offset):
    signed = stored.astype(np.int64) - offset
    return (signed.transpose(0, 1, 3, 2) * numbers.reshape(-1, 4, 4, 1)).sum((0, 1, 2))


@pytest.mark.parametrize("name", KINDS)
def test_any_numbers_and_bytes(name):
    kind, dice = KINDS[name], np.random.default_rng(0)
    numbers = dice.integers(-TOP_16, TOP_16 + 1, (16, 16)).astype(np.int32)
    numbers[0, :4], numbers[1, :6] = [TOP_16, -TOP_16, 0, -1], [127, 128, -128, -129, 255, 256]
    stored = dice.integers(0, 256, (16, 4, 16, 4)).astype(np.uint8)
    left_on = 128 - kind.offset_left  # what the instructions take off themselves
    assert total_of(kind, compiled(kind), numbers, stored).tolist() == wanted(numbers, stored, left_on).tolist()


@pytest.mark.parametrize("name", KINDS)
def test_a_sum_holds_the_greatest_weights_times_the_greatest_values(name):
    kind = KINDS[name]
    sixteens = min(kind.most_tokens, 4096) // 16  # bytes' sums hold more, each part by itself
    numbers, stored = np.full((sixteens, 16), TOP_16, np.int32), np.full((sixteens, 4, 16, 4), 255, np.uint8)
    left_on = 128 - kind.offset_left
    assert total_of(kind, compiled(kind), numbers, stored).tolist() == wanted(numbers, stored, left_on).tolist()


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].num_sums == 1])
@pytest.mark.parametrize("byte", [1, 255])
def test_one_sum_holds_a_score_of_the_most_dimensions(name, byte):
    """On the way it may wrap around, with the offset that is still on the bytes; its start takes that off."""
    kind = KINDS[name]
    sixteens = kind.most_dims // 16
    numbers, stored = np.full((sixteens, 16), -TOP_16, np.int32), np.full((sixteens, 4, 16, 4), byte, np.uint8)
    start = np.int64(kind.offset_left * TOP_16 * kind.most_dims).astype(np.int32)
    assert total_of(kind, compiled(kind), numbers, stored, start).tolist() == wanted(numbers, stored, 128).tolist()
