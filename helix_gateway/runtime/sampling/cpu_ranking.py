"""What compiled sampling asks of one row of logits: its greatest, counts, ties, cuts and masses, without a sort.

Tokens are ranked by (logit descending, id ascending); a `cut` is the logit and the id of the last token of a prefix of
that order.  A row is looked at in blocks of 128 tokens, whose maxima are found once: whoever asks for what lies above a
logit reads only the blocks that reach it.  NaN counts as -inf: every comparison with it is false.  Slices of blocks
stand where an index into the row could stand, since numba then knows that no index is negative and LLVM loads whole
vectors.  Knows nothing about noise, options or threads.
"""

import math

import numpy as np
from numba import njit

from helix_gateway.core.inner_functions import INNER
from helix_gateway.runtime.cpu.math import exp_f32
from helix_gateway.runtime.cpu.microkernels import bits_of, float_of
from helix_gateway.runtime.sampling import options

BLOCK = 128
"""Tokens looked at together (measured: benchmarks/sampling_bench.py)."""

NOTHING = np.float32(-np.inf)
"""The logit of a token that cannot be drawn."""

_ZERO = np.float32(0)
_NONE = np.int32(0)
_MANTISSA_AND_EXPONENT = np.int32(0x7FFFFFFF)
_SIGN_SHIFT = np.int32(31)
_KEY_OF_NOTHING = np.int32((0xFF800000 - 2**32) ^ 0x7FFFFFFF)

_HALF_BITS = options.MASS_BITS // 2
_HALF_MASS = np.float32(2.0**_HALF_BITS)
# exp of less than this, in units of 2**-40, is zero whole ones.
_NO_MASS_BELOW = np.float32(-math.log(2) * options.MASS_BITS - 1)


@njit(**INNER)
def _key(x):  # type: ignore[no-untyped-def]
    """An int32 that orders as the float32 does; both zeros are one, NaN is -inf."""
    bits = np.int32(bits_of(x + _ZERO))
    key = np.int32(bits ^ np.int32(np.int32(bits >> _SIGN_SHIFT) & _MANTISSA_AND_EXPONENT))
    return key if x == x else _KEY_OF_NOTHING


@njit(**INNER)
def _value(key):  # type: ignore[no-untyped-def]
    """The float32 of a key."""
    narrow = np.int32(key)
    return float_of(np.uint32(narrow ^ np.int32(np.int32(narrow >> _SIGN_SHIFT) & _MANTISSA_AND_EXPONENT)))


@njit(**INNER)
def block_of(x, b):  # type: ignore[no-untyped-def]
    """The b-th block of a row."""
    return x[b * BLOCK : min(x.size, (b + 1) * BLOCK)]


@njit(**INNER)
def set_maxima(x, maxima):  # type: ignore[no-untyped-def]
    """Write each block's greatest logit, return the row's."""
    top = _KEY_OF_NOTHING
    for b in range(maxima.size):
        block = block_of(x, b)
        most = _KEY_OF_NOTHING
        for i in range(block.size):
            key = _key(block[i])
            most = np.int32(key if key > most else most)
        maxima[b] = _value(most)
        top = max(top, most)
    return _value(top)


@njit(**INNER)
def rank_first(x, maxima, top):  # type: ignore[no-untyped-def]
    """The lowest id of the greatest logit, which the row holds."""
    b = 0
    while maxima[b] != top:
        b += 1
    token = b * BLOCK
    while x[token] != top:
        token += 1
    return token


@njit(**INNER)
def _count_block(block, least):  # type: ignore[no-untyped-def]
    count = np.int32(0)
    for i in range(block.size):
        count = np.int32(count + np.int32(block[i] >= least))
    return np.int64(count)


@njit(**INNER)
def count_from(x, maxima, least):  # type: ignore[no-untyped-def]
    """How many logits are ``least`` or more."""
    count = 0
    for b in range(maxima.size):
        if maxima[b] >= least:
            count += _count_block(block_of(x, b), least)
    return count


@njit(**INNER)
def count_ties(x, maxima, value, before):  # type: ignore[no-untyped-def]
    """How many tokens below id ``before`` have exactly this logit."""
    count = np.int64(0)
    for b in range(min(maxima.size, (before + BLOCK - 1) // BLOCK)):
        if maxima[b] >= value:
            block = x[b * BLOCK : min(before, (b + 1) * BLOCK)]
            ties = np.int32(0)
            for i in range(block.size):
                ties = np.int32(ties + np.int32(block[i] == value))
            count += np.int64(ties)
    return count


@njit(**INNER)
def _nth_tie(x, maxima, value, n):  # type: ignore[no-untyped-def]
    """The id of the n-th token (from 1) that has exactly this logit, or the last id where there are fewer."""
    for b in range(maxima.size):
        if maxima[b] >= value:
            for token in range(b * BLOCK, min(x.size, (b + 1) * BLOCK)):
                if x[token] == value:
                    n -= 1
                    if n == 0:
                        return token
    return x.size - 1


@njit(**INNER)
def _least_block_key(maxima, k, top_key):  # type: ignore[no-untyped-def]
    """A key that at least ``k`` blocks, and so as many tokens, reach; halving."""
    low, high = np.int64(_KEY_OF_NOTHING), np.int64(top_key) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        if _count_block(maxima, _value(middle)) >= k:
            low = middle
        else:
            high = middle
    return low


@njit(**INNER)
def rank_cut(x, maxima, top, k):  # type: ignore[no-untyped-def]
    """Logit and id of the token of rank ``k``, or of any cut that keeps exactly ``k``; by halving, no sort."""
    low, high = np.int64(_KEY_OF_NOTHING), np.int64(_key(top)) + 1
    if k <= maxima.size:
        low = _least_block_key(maxima, k, _key(top))
    above = 0
    while high - low > 1:
        middle = (low + high) >> 1
        count = count_from(x, maxima, _value(middle))
        if count == k:
            return _value(middle), x.size - 1
        if count > k:
            low = middle
        else:
            high, above = middle, count
    return _value(low), _nth_tie(x, maxima, _value(low), k - above)


@njit(**INNER)
def min_p_cut(top, min_difference):  # type: ignore[no-untyped-def]
    """The least logit whose float32 difference to the greatest is ``min_difference`` or more."""
    low, high = np.int64(_KEY_OF_NOTHING), np.int64(_key(top))
    while high - low > 1:
        middle = (low + high) >> 1
        if _value(middle) - top >= min_difference:
            high = middle
        else:
            low = middle
    return _value(high)


@njit(**INNER)
def _mass(x, top, factor):  # type: ignore[no-untyped-def]
    """``floor(2**40 * exp((x - top) * factor))`` in two halves of 20 bits, high and low, since vectors are of int32."""
    scaled = exp_f32((x - top) * factor) * _HALF_MASS
    high = np.int32(scaled)
    return high, np.int32((scaled - np.float32(high)) * _HALF_MASS)


@njit(**INNER)
def whole_mass(x, top, factor):  # type: ignore[no-untyped-def]
    """``floor(2**40 * exp((x - top) * factor))``."""
    high, low = _mass(x, top, factor)
    return (np.int64(high) << _HALF_BITS) + low


@njit(**INNER)
def _block_masses(block, top, factor, upper, lower):  # type: ignore[no-untyped-def]
    """As `masses`, of one block; its sum of halves, each at most 2**20, fits an int32."""
    upper_high = upper_low = lower_high = lower_low = _NONE
    for i in range(block.size):
        logit = block[i]
        high, low = _mass(logit, top, factor)
        upper_high = np.int32(upper_high + (high if logit > upper else _NONE))
        upper_low = np.int32(upper_low + (low if logit > upper else _NONE))
        lower_high = np.int32(lower_high + (high if logit > lower else _NONE))
        lower_low = np.int32(lower_low + (low if logit > lower else _NONE))
    return (np.int64(upper_high) << _HALF_BITS) + upper_low, (np.int64(lower_high) << _HALF_BITS) + lower_low


@njit(**INNER)
def masses(x, maxima, top, factor, upper, lower):  # type: ignore[no-untyped-def]
    """Masses of all tokens above ``upper``, and of all above ``lower``, which is not greater."""
    above_upper = above_lower = np.int64(0)
    for b in range(maxima.size):
        if maxima[b] > lower and (maxima[b] - top) * factor > _NO_MASS_BELOW:
            some_upper, some_lower = _block_masses(block_of(x, b), top, factor, upper, lower)
            above_upper += some_upper
            above_lower += some_lower
    return above_upper, above_lower
