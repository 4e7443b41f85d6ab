"""Sampling in torch operators, for any device that is not a CPU: only operators that DirectML registers.

The device narrows each row to a few candidates in float32; the host decides between those in float64, with the noise
of `noise.gumbel`, so that no device's logarithm decides which token is said.  Rows that leave tokens out (top-k,
top-p, min-p) are sorted whole, and masks over the sorted row say what is kept.  Hashes and masses are computed in
int64, where they never wrap.  Booleans mask and never multiply: on DirectML a product with one is a boolean
(DirectML issue 737).  Knows nothing about sequences, pages or what the logits came from.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from helix_gateway.core.errors import HelixError
from helix_gateway.core.step import Int32s, LogitEdits, LogprobRows, SamplingRows, UInt32s
from helix_gateway.runtime.sampling import noise
from helix_gateway.runtime.sampling.options import (
    MASS_BITS,
    SHARE_BITS,
    RowOptions,
    first_allowed,
    log_probabilities,
    row_options,
)

# Float32 noise is within 1e-5 of the truth, so the true winner is among the first few beyond doubt.
_CANDIDATES = 8
_WORD = 0xFFFFFFFF
# -log(1 - w) is taken by its series below this, where 1 - w has lost w's digits; six terms leave 3e-9 of it.
_SERIES_BELOW = 0.05


Shift = Callable[[torch.Tensor, int], torch.Tensor]


def by_division(x: torch.Tensor, bits: int) -> torch.Tensor:
    """``x >> bits`` of int64 that is not negative, for devices without shifts."""
    return x // (1 << bits)


def by_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """``x >> bits``, for devices whose integer division goes through float."""
    return x >> bits


def exact_shift(device: torch.device) -> Shift:
    """The way of shifting right under which this device hashes to the host's bits.

    Raises:
        HelixError: no way does; noise would not be what a seed says.
    """
    ids, keys = np.arange(64, dtype=np.int32)[None], np.array([[0x9E3779B9], [0xFFFFFFFF]], np.uint32)
    expected, wide = noise.hash_tokens(ids, keys).tolist(), (1 << 58) + (1 << SHARE_BITS) - 1
    first, second, tokens, total = (torch.tensor(v).to(device) for v in (*keys.tolist(), ids.tolist(), [wide]))
    for shift in (by_division, by_shift):
        try:
            hashes = hash_tokens(tokens, first.unsqueeze(1), second.unsqueeze(1), shift).cpu().tolist()
            if hashes == expected and shift(total, SHARE_BITS).cpu().tolist() == [wide >> SHARE_BITS]:
                return shift
        except RuntimeError:  # the device has no such operator
            continue
    raise HelixError(f"The device {device} neither divides nor shifts 64-bit integers exactly; run with --device cpu.")


def hash_tokens(
    token_ids: torch.Tensor, first_key: torch.Tensor, second_key: torch.Tensor, shift: Shift = by_division
) -> torch.Tensor:
    """`noise.hash_tokens` in multiply, xor, shift and mask.

    Args:
        token_ids: int64 [n or 1, candidates].
        first_key, second_key: int64 [n, 1], each below 2**32.
        shift: how this device shifts right.

    Returns:
        int64 [n, candidates], each below 2**32.
    """
    x = token_ids ^ first_key
    x = ((x ^ shift(x, noise.SHIFTS[0])) * noise.MULTIPLIERS[0]) & _WORD
    x = ((x ^ shift(x, noise.SHIFTS[1]) ^ second_key) * noise.MULTIPLIERS[1]) & _WORD
    x = ((x ^ shift(x, noise.SHIFTS[2])) * noise.MULTIPLIERS[2]) & _WORD
    return x ^ shift(x, noise.SHIFTS[3])


def gumbel(hashes: torch.Tensor) -> torch.Tensor:
    """Float32 noise, within 1e-5 of `noise.gumbel`: near ``u = 1`` it counts from there, where float32 has digits."""
    u, w = ((h.float() + 0.5) * 2.0**-32 for h in (hashes, _WORD - hashes))
    series = w * (1 + w * (1 / 2 + w * (1 / 3 + w * (1 / 4 + w * (1 / 5 + w * (1 / 6))))))
    exponential = torch.where(w < _SERIES_BELOW, series, -torch.log(u))
    return -torch.log(exponential)


def masses(differences: torch.Tensor) -> torch.Tensor:
    """``floor(2**40 * exp(d))`` of float32 ``d <= 0``, int64."""
    return (torch.exp(differences) * 2.0**MASS_BITS).long()


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Tokens of each row in the order in which they are considered."""

    differences: torch.Tensor
    """float32 [n, vocab], ``x - max``."""
    token_ids: torch.Tensor
    """int64 [n or 1, vocab]"""


@dataclass(frozen=True, slots=True)
class _Candidates:
    """What comes back from the device."""

    token_ids: npt.NDArray[np.int64]
    """[n, candidates]"""
    scaled: npt.NDArray[np.float32]
    """[n, candidates], ``(x - max) / temperature``."""
    kept: npt.NDArray[np.bool_]
    """[n, candidates]"""


class TorchSampler:
    """Chooses tokens from rows of logits on one device.

    Args:
        device: where the logits lie.
        vocab_size: columns of the logits.
    """

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._ids = torch.arange(vocab_size, device=device).unsqueeze(0)
        self._bits = torch.tensor([1 << b for b in range(32)]).to(device)
        self._shift = exact_shift(device)

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> Int32s:
        """Choose one token for each sampling row.

        Args:
            logits: float32 [rows, vocab]; left as they are.
            rows: options and noise counters, see `SamplingRows`.

        Returns:
            int32 [num_samples].
        """
        if rows.logits_index.size == 0:
            return np.empty(0, np.int32)
        options = row_options(rows, self._vocab_size)
        x = self._edited(logits, rows)
        top = x.amax(dim=1, keepdim=True)
        likeliest, tops = self._first_of(x, top).cpu().numpy(), top.squeeze(1).cpu().numpy()
        plain = options.greedy | np.isinf(tops)
        chosen = likeliest if plain.all() else np.where(plain, likeliest, self._noisy(x, top, options))
        empty = np.isneginf(tops)
        return np.asarray(np.where(empty, first_allowed(rows), chosen) if empty.any() else chosen).astype(np.int32)

    def logprobs(self, logits: torch.Tensor, logits_index: Int32s, token_ids: Int32s, top: int) -> LogprobRows:
        """Log-probabilities of the raw rows.

        Args:
            logits: float32 [rows, vocab]; left as they are.
            logits_index: int32 [n], rows of the logits.
            token_ids: int32 [n], the token of each row to report.
            top: how many of each row's likeliest tokens to report.
        """
        x = self._values(logits, logits_index)
        ranked = self._ranked(x, x.amax(dim=1, keepdim=True))
        ids, differences = ranked.token_ids, ranked.differences
        ranks = self._ids.repeat(ids.shape[0], 1)
        rank = ranks.masked_fill_(ids != self._column(token_ids), 0).sum(dim=1, keepdim=True)
        total = masses(differences).sum(dim=1, keepdim=True).cpu().numpy()
        return LogprobRows(
            logprobs=log_probabilities(differences.gather(1, rank).cpu().numpy(), total).squeeze(1),
            ranks=(rank.squeeze(1) + 1).cpu().numpy().astype(np.int32),
            top_ids=ids[:, :top].cpu().numpy().astype(np.int32),
            top_logprobs=log_probabilities(differences[:, :top].cpu().numpy(), total),
        )

    def _on_device(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        """Integers as int64, floats as float32."""
        wide = values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
        return torch.from_numpy(wide).to(self._device)

    def _column(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return self._on_device(values).unsqueeze(1)

    def _values(self, logits: torch.Tensor, logits_index: Int32s) -> torch.Tensor:
        """A copy of the wanted rows in which NaN has become -inf."""
        x = logits.index_select(0, self._on_device(logits_index))
        return x.masked_fill_(torch.isnan(x), -torch.inf)

    def _edited(self, logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """[n, vocab], a copy of the wanted rows with edits and allowed tokens applied."""
        x = self._values(logits, rows.logits_index)
        if rows.edits.rows.size:
            self._apply(x, rows.edits)
        if rows.allowed is not None:
            words = self._on_device(rows.allowed).unsqueeze(2)
            banned = ((words & self._bits) == 0).reshape(x.shape[0], -1)[:, : self._vocab_size]
            x.masked_fill_(banned, -torch.inf)
        return x

    def _apply(self, x: torch.Tensor, edits: LogitEdits) -> None:
        flat = x.view(-1)
        where = self._on_device(edits.rows.astype(np.int64) * self._vocab_size + edits.token_ids)
        scale, old = self._on_device(edits.scale), flat.index_select(0, where)
        new = torch.where(old > 0, old / scale, old * scale) + self._on_device(edits.shift)
        flat.scatter_(0, where, new.masked_fill_(torch.isnan(new), -torch.inf))

    def _first_of(self, x: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        """The lowest id of each row's greatest value, int64 [n]."""
        back_to_front = ((self._vocab_size - 1) - self._ids).repeat(x.shape[0], 1)
        return (self._vocab_size - 1) - back_to_front.masked_fill_(x != top, 0).amax(dim=1)

    def _differences(self, x: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        """``x - top``; 0 for the greatest even where they are infinite, -inf in a row that has nothing."""
        d = (x - top).masked_fill_(x == top, 0.0)
        return d.masked_fill_(x == -torch.inf, -torch.inf)

    def _ranked(self, x: torch.Tensor, top: torch.Tensor) -> _Ranked:
        """The likeliest first, equal ones by ascending id."""
        order = torch.sort(x, dim=1, descending=True, stable=True)
        return _Ranked(self._differences(order[0], top), order[1])

    def _noisy(self, x: torch.Tensor, top: torch.Tensor, options: RowOptions) -> npt.NDArray[np.int64]:
        """The kept token of greatest ``log p + g`` in each row."""
        factor = self._column(options.inverse_temperature)
        if options.filters(self._vocab_size):
            ranked = self._ranked(x, top)
            kept = self._kept(ranked, factor, options)
        else:
            ranked = _Ranked(self._differences(x, top), self._ids)
            kept = ranked.differences > -torch.inf
        candidates = self._candidates(ranked, kept, factor, options.keys)
        return _decide(candidates, options.keys)

    def _kept(self, ranked: _Ranked, factor: torch.Tensor, options: RowOptions) -> torch.Tensor:
        """What min-p, top-k and top-p leave of sorted rows; bool [n, vocab]."""
        d = ranked.differences
        kept = (d >= self._column(options.min_difference)) & (self._ids < self._column(options.top_k))
        kept &= d > -torch.inf
        mass = masses(d * factor).masked_fill_(~kept, 0)
        before = mass.cumsum(dim=1) - mass
        needed = self._share_of(mass.sum(dim=1, keepdim=True), self._column(options.share))
        return kept & ((before < needed) | (self._ids == 0))

    def _candidates(self, ranked: _Ranked, kept: torch.Tensor, factor: torch.Tensor, keys: UInt32s) -> _Candidates:
        scaled = ranked.differences * factor
        hashes = hash_tokens(ranked.token_ids, self._column(keys[0]), self._column(keys[1]), self._shift)
        score = (scaled + gumbel(hashes)).masked_fill_(~kept, -torch.inf)
        best = score.topk(min(_CANDIDATES, self._vocab_size), dim=1)[1]
        ids = ranked.token_ids.expand(scaled.shape[0], -1).gather(1, best)
        return _Candidates(ids.cpu().numpy(), scaled.gather(1, best).cpu().numpy(), kept.gather(1, best).cpu().numpy())

    def _share_of(self, total: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """``ceil(total * share / 2**30)`` without a product beyond 63 bits."""
        below_one = (1 << SHARE_BITS) - 1
        rest = (total & below_one) * share + below_one
        return self._shift(total, SHARE_BITS) * share + self._shift(rest, SHARE_BITS)


def _decide(candidates: _Candidates, keys: UInt32s) -> npt.NDArray[np.int64]:
    """The winner of each row in float64, ties to the lower id; int64 [n]."""
    hashes = noise.hash_tokens(candidates.token_ids.astype(np.int32), keys)
    scores = np.where(candidates.kept, candidates.scaled + noise.gumbel(hashes), -np.inf)
    best = scores.max(axis=1, keepdims=True)
    beyond = np.iinfo(np.int64).max
    return np.asarray(np.where(scores == best, candidates.token_ids, beyond).min(axis=1))
