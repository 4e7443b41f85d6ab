"""The flat tensors of one step, and what comes back: all that crosses between the engine and a model runner.

numpy arrays, since the engine has no devices; a runner moves them where it computes.  Nothing here is padded
to the longest sequence: rows of all sequences follow one another, ``cu_seqlens`` says where each begins.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32s = npt.NDArray[np.int32]
UInt32s = npt.NDArray[np.uint32]
UInt64s = npt.NDArray[np.uint64]
Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One ragged forward: prefill chunks, plain decodes and verify windows side by side.

    Nobody writes to its arrays: what is the same at the next step may be the same array.
    """

    token_ids: Int32s
    """[num_tokens]"""
    positions: Int32s
    """[num_tokens], the place of each token in its sequence."""
    cu_seqlens: Int32s
    """[num_seqs + 1]; sequence s owns rows cu_seqlens[s]:cu_seqlens[s + 1]."""
    context_lens: Int32s
    """[num_seqs], tokens whose KV exists once this forward is done."""
    block_tables: tuple[Int32s, ...]
    """For each KV group of the runner, [num_seqs, max_blocks]; entries that a window no longer reads are 0."""
    logits_rows: Int32s
    """[num_rows], the rows of the flat batch whose logits are wanted, ascending."""


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Sparse changes to logits, all of one length: ``x = (x / scale if x > 0 else x * scale) + shift``.

    Penalties, bias and bans are all of this form, so a runner needs one scatter for them.  Entries are in the
    order of ``rows``; a (row, token) pair stands at most once.
    """

    rows: Int32s
    """Index into the SamplingRows (not into the logits)."""
    token_ids: Int32s
    scale: Float32s
    shift: Float32s
    """-inf bans a token."""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How to choose one token from each of some rows of logits; every array is [num_samples], and nobody writes to it."""

    logits_index: Int32s
    """Row of the logits that the forward returned."""
    seed: UInt64s
    choice: Int32s
    position: Int32s
    """Where in the sequence (prompt included) the token will stand: what the noise is counted by."""
    temperature: Float32s
    """0 is greedy."""
    top_k: Int32s
    """The vocabulary's size where not asked for."""
    top_p: Float32s
    min_p: Float32s
    edits: LogitEdits
    allowed: UInt32s | None = None
    """[num_samples, ceil(vocab / 32)] bits of tokens that a grammar allows; None: all."""


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Raw log-probabilities of given tokens and of the most likely ones."""

    logprobs: Float32s
    """[n]"""
    ranks: Int32s
    """[n], 1 for the most likely."""
    top_ids: Int32s
    """[n, top], most likely first; equal ones by ascending id."""
    top_logprobs: Float32s
    """[n, top]"""
