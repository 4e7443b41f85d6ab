"""Dot products of bytes are exact with every instruction set, at the largest numbers too, where others saturate."""

import numpy as np
import pytest
from llvmlite import binding
from numba import njit, types
from numba.extending import intrinsic

from helix_gateway.runtime.cpu.emitter import I32S, Emitter
from helix_gateway.runtime.cpu.integer_dot import DOTS

FEATURES = binding.get_host_cpu_features()
NEEDS = {
    "vnni512": FEATURES.get("avx512vnni"),
    "vnni256": FEATURES.get("avxvnni") or (FEATURES.get("avx512vnni") and FEATURES.get("avx512vl")),
    "avx2": FEATURES.get("avx2"),
    "portable": True,
}


def compiled(name):
    """``dot(sums, unsigned, signed)``, addresses of 16 int32 each; the result is left in ``sums``."""

    @intrinsic
    def dot(typing_context, sums, unsigned, signed):
        def emit(context, builder, signature, args):
            emitter = Emitter(builder)
            emitter.store(DOTS[name](emitter, *(emitter.load(address, I32S) for address in args)), args[0])
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), emit

    @njit
    def run(sums, unsigned, signed):
        dot(sums.ctypes.data, unsigned.ctypes.data, signed.ctypes.data)

    return run


@pytest.mark.parametrize("name", DOTS)
def test_four_products_a_lane_are_added_exactly(name):
    if not NEEDS[name]:
        pytest.skip("this processor has no such instruction")
    dot, dice = compiled(name), np.random.default_rng(0)
    unsigned, signed = dice.integers(0, 256, (40, 64)), dice.integers(-128, 128, (40, 64))
    unsigned[:8] = 255
    signed[0], signed[1], signed[2, ::2] = 127, -128, -128
    for a, b in zip(unsigned, signed):
        sums = dice.integers(-(2**30), 2**30, 16).astype(np.int32)
        wanted = sums + (a * b).reshape(16, 4).sum(1)
        dot(sums, a.astype(np.uint8), b.astype(np.int8))
        assert sums.tolist() == wanted.tolist()
