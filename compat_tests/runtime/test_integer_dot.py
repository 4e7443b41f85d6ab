"""Dot products of bytes are exact with every instruction set, at the largest numbers too, where others saturate."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit, types
from numba.extending import intrinsic

from helix_gateway.runtime.cpu.emitter import I32S, Emitter
from helix_gateway.runtime.cpu.instruction_sets import is_x86, target_features
from helix_gateway.runtime.cpu.integer_dot import DOTS, OFFSETS

FEATURES = target_features()
NEEDS = {
    "vnni512": {"avx512f", "avx512vnni"} <= FEATURES,
    "vnni256": {"avx2", "avxvnni"} <= FEATURES or {"avx512vl", "avx512vnni"} <= FEATURES,
    "avx2": "avx2" in FEATURES,
    "i8mm": "i8mm" in FEATURES,
    "dotprod": "dotprod" in FEATURES,
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
        wanted = sums + ((a - OFFSETS[name]) * b).reshape(16, 4).sum(1)
        dot(sums, a.astype(np.uint8), b.astype(np.int8))
        assert sums.tolist() == wanted.tolist()


CHOICE = """
from compat_tests.runtime.test_integer_dot import compiled
from helix_gateway.runtime.cpu import attention_int8_items, attention_kernels, integer_dot, products
import numpy as np
if integer_dot.host_dot() in integer_dot.DOTS:
    dot, sums = compiled(integer_dot.host_dot()), np.zeros(16, np.int32)
    dot(sums, np.full(64, 255, np.uint8), np.full(64, -128, np.int8))
    assert sums.tolist() == [4 * (255 - integer_dot.OFFSETS[integer_dot.host_dot()]) * -128] * 16
print(
    integer_dot.host_dot(),
    attention_int8_items.MANY_ROWS,
    attention_kernels.WIDE_ROWS,
    products.host_shape().registers,
)
"""
TOLD = {
    "vnni512": ("cascadelake", "+avx,+avx2,+fma,+avx512f,+avx512vnni", "vnni512 6 8 32"),
    "avx512f": ("skylake-avx512", "+avx,+avx2,+fma,+avx512f", "avx2 4 8 32"),
    "avx2": ("znver3", "+avx,+avx2,+fma", "avx2 4 4 8"),
    "nothing": ("generic", "", "portable 2 4 8"),
}


@pytest.mark.skipif(not is_x86(), reason="these are names of x86")
@pytest.mark.parametrize("name", TOLD)
def test_kernels_are_chosen_by_what_numba_compiles_for(name, tmp_path):
    """Not by what the processor could run: LLVM cannot emit what its target lacks."""
    cpu, features, chosen = TOLD[name]
    if not {feature[1:] for feature in features.split(",") if feature} <= FEATURES:
        pytest.skip("this processor has less than that")
    told = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    command, root = [sys.executable, "-c", CHOICE], Path(__file__).parents[2]
    done = subprocess.run(command, env=os.environ | told, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == chosen, done.stderr[-3000:]
