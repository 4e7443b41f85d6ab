"""The noise that chooses tokens: a counter-based function of (seed, choice, position, token id), and nothing else.

Two stages.  On the host, 64 bits of seed, the choice index and the position are mixed into two 32-bit keys a row
(`row_keys`); on the device every token id is hashed under those keys to 32 bits (`hash_tokens` here, in torch
operators in `torch_sampler`, compiled in `cpu_kernels`: the same bits in all three).  A hash h stands for the uniform
number ``u = (h + 1/2) / 2**32`` and the Gumbel(0, 1) number ``g = -log(-log(u))``; the token whose ``log p + g`` is
greatest is a draw from p (Gumbel 1954; Maddison, Tarlow and Minka, "A* Sampling", 2014).

The hash is of multiply, xor and shift right only, and every multiplier is below 2**31: a product of it and 32 bits
fits a signed 64-bit integer, so a device without shifts or unsigned numbers computes the same with multiply, xor,
divide and a mask, and nothing ever wraps.  Knows nothing about logits, options or devices; numba compiles the constants
into `cpu_kernels`.
"""

import numpy as np
import numpy.typing as npt

from helix_gateway.core.step import Int32s, UInt32s, UInt64s

# Odd, with about as many ones as zeros, below 2**31; three rounds between shifts of about half a word.
# Measured in compat_tests/runtime/test_sampling_noise.py: each input bit flips each output bit in 48-52 % of cases.
MULTIPLIERS = (0x7FEB352D, 0x21F0AAAD, 0x31848BAB)
SHIFTS = (16, 15, 15, 16)
MAX_NOISE = 22.9
"""No noise is greater: -log(-log(1 - 2**-33)) is 22.874."""

# SplitMix64 (Steele, Lea and Flood, 2014): its increment, and the finaliser that its authors took from Stafford.
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix64(x: UInt64s) -> UInt64s:
    """A bijection of 64 bits under which one changed bit changes about half of all."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    # Typed, since numpy's releases disagree on what an array xor an array is to a type checker.
    mixed: UInt64s = x ^ (x >> np.uint64(31))
    return mixed


def row_keys(seed: UInt64s, choice: Int32s, position: Int32s) -> UInt32s:
    """Two keys for each row.

    Args:
        seed: uint64 [n].
        choice: int32 [n].
        position: int32 [n].

    Returns:
        uint32 [2, n]; for one seed all pairs of (choice, position) have different keys.
    """
    counter = (choice.astype(np.uint64) << np.uint64(32)) | position.astype(np.uint32)
    keys = mix64(mix64(seed + _INCREMENT) + counter * _INCREMENT)
    return np.stack([keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)])


def hash_tokens(token_ids: Int32s, keys: UInt32s) -> UInt32s:
    """Hash token ids under the keys of their rows.

    Args:
        token_ids: [n, candidates].
        keys: [2, n], as from `row_keys`.

    Returns:
        uint32 [n, candidates].
    """
    first, second, third = (np.uint32(m) for m in MULTIPLIERS)
    shifts = [np.uint32(s) for s in SHIFTS]
    x = token_ids.astype(np.uint32) ^ keys[0][:, None]
    x = (x ^ (x >> shifts[0])) * first
    x = (x ^ (x >> shifts[1]) ^ keys[1][:, None]) * second
    x = (x ^ (x >> shifts[2])) * third
    return np.asarray(x ^ (x >> shifts[3]))


def gumbel(hashes: UInt32s) -> npt.NDArray[np.float64]:
    """Gumbel(0, 1) noise of each hash, float64 of the same shape."""
    u = (hashes.astype(np.float64) + 0.5) * 2.0**-32
    return np.asarray(-np.log(-np.log(u)))
