"""Scalar float32 mathematics for compiled CPU code: bfloat16 to and from float32, and an exponential.

Every function is njit-able, written without branches so that LLVM's vectoriser widens a loop over it, and gives the
same bits on every processor: each product-and-sum is an explicit fused multiply-add.  Do not call these from a
function compiled with ``fastmath``, which may reorder them.  Knows nothing about arrays, threads or models.
"""

import numpy as np
from numba import njit

from helix_gateway.runtime.cpu.microkernels import bits_of, float_of, fma

LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts; the high one has 9 significant bits, so its product with an exponent is exact.
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
# 1.5 * 2**23: adding it rounds to an integer, which then stands in the low mantissa bits.
ROUND = np.float32(12582912.0)
# exp(r) = 1 + r + r**2 * p(r) on |r| <= ln 2 / 2, with p of degree 5 fitted (Lawson's reweighted least squares) to the
# least greatest relative error, 5e-11 before rounding to float32.
_P5 = np.float32(1.9790297899e-4)
_P4 = np.float32(1.3944703568e-3)
_P3 = np.float32(8.3334973413e-3)
_P2 = np.float32(4.1666294364e-2)
_P1 = np.float32(1.6666665867e-1)
_P0 = np.float32(5.0000000678e-1)
EXP_TERMS = tuple(float(term) for term in (_P5, _P4, _P3, _P2, _P1, _P0))
"""The polynomial p of `exp_f32`, highest power first, for whoever writes it out as vector code."""
# The least and greatest arguments whose result is a normal number by adding to the exponent field.
EXP_MIN = np.float32(-87.33)
EXP_MAX = np.float32(88.37)

_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)
_EXPONENT_SHIFT = np.uint32(23)
_HALF_WORD = np.uint32(16)
_HALF_MINUS_ONE = np.uint32(0x7FFF)
_LOW_BIT = np.uint32(1)
_QUIET = np.uint32(0x40)


@njit
def exp_f32(x):  # type: ignore[no-untyped-def]
    """``e ** x`` in float32, within 1 ulp for x in [-87, 88].

    Below -87.33 the result is 0 (also for -inf), above 88.37 it stays at ``exp(88.37)``, about 2.4e38; NaN stays NaN.
    """
    capped = EXP_MAX if x > EXP_MAX else x
    rounded = fma(capped, LOG2_E, ROUND)
    n = rounded - ROUND
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, capped))
    p = fma(fma(fma(fma(fma(_P5, r, _P4), r, _P3), r, _P2), r, _P1), r, _P0)
    p = fma(p, r * r, r) + _ONE
    y = float_of(np.uint32(bits_of(p) + (bits_of(rounded) << _EXPONENT_SHIFT)))
    return _ZERO if x < EXP_MIN else y


@njit
def load_bf16(bits):  # type: ignore[no-untyped-def]
    """The float32 equal to the bfloat16 whose 16 bits (uint16) are given."""
    return float_of(np.uint32(bits) << _HALF_WORD)


@njit
def store_bf16(x):  # type: ignore[no-untyped-def]
    """Bits (uint16) of the bfloat16 nearest to a float32, ties to even; infinities stay, NaN stays NaN (quiet)."""
    bits = bits_of(x)
    rounded = (bits + _HALF_MINUS_ONE + ((bits >> _HALF_WORD) & _LOW_BIT)) >> _HALF_WORD
    nan = (bits >> _HALF_WORD) | _QUIET
    return np.uint16(nan if x != x else rounded)
