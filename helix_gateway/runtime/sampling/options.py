"""Sampling options as the numbers that every device computes with, made once on the host so that all agree to the bit.

Temperature becomes a float32 factor, min-p a float32 bound on ``x - max``, top-p a count of 2**-30 parts.  The mass of
a token is ``floor(2**40 * exp((x - max) / temperature))``: in integers a sum has no order, so neither threads, nor a
neighbour in the batch, nor the device's way of adding can show in what is kept.  Knows nothing about devices; numba
compiles the constants into `cpu_kernels`, which makes the same numbers of rows, but their keys and min-p's.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from helix_gateway.core.step import Float32s, Int32s, SamplingRows, UInt32s
from helix_gateway.runtime.sampling import noise

Int64s = npt.NDArray[np.int64]

MASS_BITS = 40
"""The likeliest token's mass is 2**40; with 2**18 tokens sums stay below 2**58."""
SHARE_BITS = 30
"""top_p is counted in parts of 2**-30, which holds every float32 from 2**-7 to 1 exactly."""

# Below this a temperature's inverse would overflow float32; any such row is greedy in effect.
MIN_TEMPERATURE = np.float32(1e-37)
# Above this the inverse would be so small that some devices round it to zero.
MAX_TEMPERATURE = np.float32(1e37)


@dataclass(frozen=True, slots=True)
class RowOptions:
    """Every array is [num_samples]."""

    keys: UInt32s
    """[2, num_samples]"""
    greedy: npt.NDArray[np.bool_]
    inverse_temperature: Float32s
    """Without meaning in greedy rows."""
    top_k: Int64s
    """1 to the vocabulary's size."""
    share: Int64s
    """top_p in parts of 2**-30."""
    min_difference: Float32s
    """Tokens with ``x - max`` below this fall to min-p; -inf where it is not asked for."""

    def filters(self, vocab_size: int) -> bool:
        """Whether any row leaves out tokens by rank, mass or probability."""
        kept_by_rank = bool((self.top_k == vocab_size).all())
        kept_by_mass = bool((self.share == 1 << SHARE_BITS).all())
        return not (kept_by_rank and kept_by_mass and bool(np.isneginf(self.min_difference).all()))


def row_options(rows: SamplingRows, vocab_size: int) -> RowOptions:
    """What the options of each row mean in numbers; see `RowOptions`."""
    temperature = _bounded(rows.temperature)
    return RowOptions(
        keys=noise.row_keys(rows.seed, rows.choice, rows.position),
        greedy=rows.temperature <= 0,
        inverse_temperature=(np.float32(1) / temperature).astype(np.float32, copy=False),
        top_k=np.minimum(np.maximum(rows.top_k, 1), vocab_size).astype(np.int64),
        share=np.rint(rows.top_p * np.float64(1 << SHARE_BITS)).astype(np.int64),
        min_difference=min_differences(rows),
    )


def min_differences(rows: SamplingRows) -> Float32s:
    """As `RowOptions` has them; float32 [num_samples]."""
    if not rows.min_p.any():
        return np.full(rows.min_p.size, -np.inf, np.float32)
    with np.errstate(divide="ignore"):
        return (_bounded(rows.temperature) * np.log(rows.min_p.astype(np.float64))).astype(np.float32)


def _bounded(temperature: Float32s) -> Float32s:
    bounded: Float32s = np.minimum(np.maximum(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)
    return bounded


def first_allowed(rows: SamplingRows) -> Int32s:
    """The lowest id that each row's mask allows, or 0: said when every logit is -inf; int32 [num_samples]."""
    if rows.allowed is None:
        return np.zeros(rows.logits_index.size, np.int32)
    bits = np.unpackbits(np.ascontiguousarray(rows.allowed).view(np.uint8), axis=1, bitorder="little")
    return np.asarray(bits.argmax(axis=1), np.int32)


def log_probabilities(differences: Float32s, total: Int64s) -> Float32s:
    """``d - log(total mass)``, in float64 and then rounded; -inf where there is no mass at all.

    Args:
        differences: float32 [n, any], ``x - max``.
        total: int64 [n, 1], the mass of each row in units of 2**-40.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = differences - (np.log(total) - MASS_BITS * np.log(2.0))
    return np.where(np.isneginf(differences), -np.inf, logs).astype(np.float32)
