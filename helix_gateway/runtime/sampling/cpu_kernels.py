"""Compiled sampling for a CPU: from rows of float32 logits to token ids, and to log-probabilities, without a sort.

**Why the search is exact.**  A token's score is ``(x - max) / T + g``, and its noise g does not depend on what is
kept.  Every filter (min-p, top-k, top-p) keeps a prefix of the order in which `cpu_ranking` ranks tokens.  So the best
of a prefix is found by searching a longer one: if the best of the longer prefix lies in the shorter, it is the best
there too.  If it does not, then neither it nor anything ranked below it is kept, the cut rises above it, and the search
goes on in what is left, which still holds the whole shorter prefix.  Top-k and min-p are cut at once, since their cut
is cheap to find; top-p is only asked whether it keeps the winner (the mass ranked above it is below the share), which
takes one pass in the usual case.

**Why it is fast.**  The noise is not greater than ``-log(1 - u)``, whose logarithm's bits are almost those of the
float: the loop over all tokens is a hash, a multiply and an addition, and a comparison with the best so far, on
vectors.  Two logarithms in float64 are taken for the few that pass.  Blocks of tokens of which not even the greatest
could win are not hashed at all.

**Why it is the same every time.**  Each row is computed by one thread from its own values; the best is a maximum and
masses are integers, so no order of evaluation can show.  Knows nothing about torch or requests.
"""

import math

import numpy as np
from numba import njit, prange

from helix_gateway.core.inner_functions import INNER
from helix_gateway.core.sorted_search import first_from
from helix_gateway.runtime.cpu.microkernels import bits_of
from helix_gateway.runtime.sampling import noise, options
from helix_gateway.runtime.sampling.cpu_ranking import (
    BLOCK,
    NOTHING,
    block_of,
    count_from,
    count_ties,
    masses,
    min_p_cut,
    rank_cut,
    rank_first,
    set_maxima,
    whole_mass,
)

_OFFSETS = np.arange(BLOCK, dtype=np.uint32)
_M1, _M2, _M3 = (np.uint32(m) for m in noise.MULTIPLIERS)
_S1, _S2, _S3, _S4 = (np.uint32(s) for s in noise.SHIFTS)
_ONE = np.uint32(1)

# With k the hash's complement, 1 - u = (k + 1/2) / 2**32 and -log(-log(u)) < -log(1 - u).  A float32's bits, read as
# an integer and divided by 2**23, are 127 + log2 of it or up to 0.0861 less.  k is halved to fit a signed integer.
_NOISE_AT_ZERO_BITS = np.float32((32 - 1 + 127) * math.log(2))
_NOISE_A_BIT = np.float32(-math.log(2) / 2**23)
# More than all float32 rounding in a bound, which is below 100.
_SLACK = np.float32(1e-3)

_ZERO = np.float32(0)
_MIN_TEMPERATURE, _MAX_TEMPERATURE = options.MIN_TEMPERATURE, options.MAX_TEMPERATURE
_SHARE_BITS = options.SHARE_BITS
_WHOLE = 1 << options.SHARE_BITS


@njit(**INNER)
def _inverse_temperature(temperature):  # type: ignore[no-untyped-def]
    """As `options.row_options` has it."""
    return np.float32(np.float32(1) / min(max(temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE))


@njit
def _hash(x, second_key):  # type: ignore[no-untyped-def]
    """32 bits of ``x = token id ^ first key`` under the second key; as `noise.hash_tokens`."""
    x = np.uint32(np.uint32(x ^ np.uint32(x >> _S1)) * _M1)
    x = np.uint32(np.uint32(np.uint32(x ^ np.uint32(x >> _S2)) ^ second_key) * _M2)
    x = np.uint32(np.uint32(x ^ np.uint32(x >> _S3)) * _M3)
    return np.uint32(x ^ np.uint32(x >> _S4))


@njit(**INNER)
def _gumbel(h):  # type: ignore[no-untyped-def]
    """Noise of a hash in float64; as `noise.gumbel`."""
    return -math.log(-math.log((np.float64(h) + 0.5) * 2.0**-32))


@njit
def _noise_bound(h):  # type: ignore[no-untyped-def]
    """A float32 that the noise of a hash does not exceed by more than rounding."""
    k = np.float32(np.int32(np.uint32(~h) >> _ONE))
    return _NOISE_AT_ZERO_BITS + _NOISE_A_BIT * np.float32(np.int32(bits_of(k)))


@njit(**INNER)
def _share_of(total, share):  # type: ignore[no-untyped-def]
    """``ceil(total * share / 2**30)`` without a product beyond 63 bits."""
    rest = (total & (_WHOLE - 1)) * share
    return (total >> _SHARE_BITS) * share + ((rest + _WHOLE - 1) >> _SHARE_BITS)


@njit(**INNER)
def _may_win(block, top, factor, hashed, second_key, cut, limit):  # type: ignore[no-untyped-def]
    """Whether the bound of any token of the block that the cut may keep exceeds ``limit``."""
    hit = np.int32(0)
    for i in range(block.size):
        logit = block[i]
        bound = (logit - top) * factor + _noise_bound(_hash(np.uint32(_OFFSETS[i] ^ hashed), second_key))
        hit = np.int32(hit | (np.int32(bound > limit) & np.int32(logit >= cut)))
    return hit != 0


@njit(**INNER)
def _best_of_block(x, b, top, factor, first_key, second_key, cut, cut_id, best, best_id):  # type: ignore[no-untyped-def]
    """The better of the best so far and of the block's best, ties to the lower id."""
    for token in range(b * BLOCK, min(x.size, (b + 1) * BLOCK)):
        logit = x[token]
        if logit > cut or (logit == cut and token <= cut_id):
            h = _hash(np.uint32(np.uint32(token) ^ first_key), second_key)
            scaled = (logit - top) * factor
            if scaled + _noise_bound(h) > np.float32(best) - _SLACK:
                score = np.float64(scaled) + _gumbel(h)
                if score > best or (score == best and token < best_id):
                    best, best_id = score, token
    return best, best_id


@njit(**INNER)
def _noisy_best(x, maxima, top, factor, first_key, second_key, cut, cut_id):  # type: ignore[no-untyped-def]
    """The token of greatest score among those that the cut keeps; begins where the greatest logit is."""
    start = 0
    while maxima[start] != top:
        start += 1
    best, best_id = _best_of_block(x, start, top, factor, first_key, second_key, cut, cut_id, -np.inf, np.int64(x.size))
    for b in range(maxima.size):
        limit = np.float32(best) - _SLACK
        if b == start or maxima[b] < cut or (maxima[b] - top) * factor + np.float32(noise.MAX_NOISE) < limit:
            continue
        hashed = np.uint32(np.uint32(b * BLOCK) ^ first_key)
        if _may_win(block_of(x, b), top, factor, hashed, second_key, cut, limit):
            best, best_id = _best_of_block(x, b, top, factor, first_key, second_key, cut, cut_id, best, best_id)
    return best_id


@njit(**INNER)
def _choose(x, maxima, top, factor, first_key, second_key, top_k, share, min_difference):  # type: ignore[no-untyped-def]
    """The noisy best among what min-p, top-k and top-p keep of one row."""
    cut, cut_id = NOTHING, np.int64(x.size - 1)
    if top_k < x.size:
        cut, cut_id = rank_cut(x, maxima, top, top_k)
    if min_difference > NOTHING:
        least = min_p_cut(top, min_difference)
        if least > cut:
            cut, cut_id = least, np.int64(x.size - 1)
    lower, lower_id = cut, cut_id
    while True:
        token = _noisy_best(x, maxima, top, factor, first_key, second_key, cut, cut_id)
        if share == _WHOLE or token == x.size:
            return token
        logit = x[token]
        above, kept = masses(x, maxima, top, factor, logit, lower)
        above += count_ties(x, maxima, logit, token) * whole_mass(logit, top, factor)
        kept += count_ties(x, maxima, lower, lower_id + 1) * whole_mass(lower, top, factor)
        if above < max(_share_of(kept, share), 1):
            return token
        cut, cut_id = logit, np.int64(token - 1)


@njit(**INNER)
def _holds_nan(x):  # type: ignore[no-untyped-def]
    found = np.int32(0)
    for i in range(x.size):
        found = np.int32(found | np.int32(x[i] != x[i]))
    return found != 0


@njit(**INNER)
def _without_nan(x):  # type: ignore[no-untyped-def]
    """A copy of a row in which NaN has become -inf."""
    out = np.empty_like(x)
    for i in range(out.size):
        out[i] = x[i] if x[i] == x[i] else NOTHING
    return out


@njit(**INNER)
def _edit(out, token_ids, scale, shift):  # type: ignore[no-untyped-def]
    """``x = (x / scale if x > 0 else x * scale) + shift`` for some tokens of a row; NaN becomes -inf."""
    for i in range(token_ids.size):
        x = out[token_ids[i]]
        x = (x / scale[i] if x > _ZERO else x * scale[i]) + shift[i]
        out[token_ids[i]] = x if x == x else NOTHING


@njit(**INNER)
def _allow(out, words):  # type: ignore[no-untyped-def]
    """Ban every token whose bit is not set."""
    for w in range(words.size):
        some = out[w * 32 : min(out.size, (w + 1) * 32)]
        word = words[w]
        for i in range(some.size):
            some[i] = some[i] if np.uint32(word >> np.uint32(i)) & _ONE else NOTHING


@njit(**INNER)
def _first_allowed(words):  # type: ignore[no-untyped-def]
    """The lowest set bit, or 0."""
    for w in range(words.size):
        for i in range(32):
            if np.uint32(words[w] >> np.uint32(i)) & _ONE:
                return w * 32 + i
    return 0


@njit(**INNER)
def _edited(x, token_ids, scale, shift, words):  # type: ignore[no-untyped-def]
    """The row with its edits and its mask; the row itself where there are neither."""
    if token_ids.size == 0 and words.size == 0:
        return x
    out = _without_nan(x)
    _edit(out, token_ids, scale, shift)
    if words.size > 0:
        _allow(out, words)
    return out


@njit(**INNER)
def _sample_row(r, x, maxima, row_options, words):  # type: ignore[no-untyped-def]
    """One row after its edits, see `sample_rows`; its options become numbers as in `options.row_options`."""
    keys, temperature, top_k, top_p, min_difference = row_options
    top = set_maxima(x, maxima)
    if top == NOTHING:
        return _first_allowed(words)
    if temperature[r] <= 0 or top == np.inf:
        return rank_first(x, maxima, top)
    factor = _inverse_temperature(temperature[r])
    rank = min(max(np.int64(top_k[r]), 1), x.size)
    share = np.int64(np.rint(np.float64(top_p[r]) * _WHOLE))
    return _choose(x, maxima, top, factor, keys[0, r], keys[1, r], rank, share, min_difference[r])


@njit(nogil=True, cache=True, parallel=True)
def sample_rows(logits, index, row_options, edits, allowed, out):  # type: ignore[no-untyped-def]
    """Choose one token a row, rows spread over the threads.

    Args:
        logits: float32 [rows, vocab].
        index: int32 [n].
        row_options: temperature, top_k and top_p as in `SamplingRows`, behind keys (without meaning in greedy rows) and
            before min_difference as in `options.RowOptions`.
        edits: rows, token ids, scale and shift as in `LogitEdits`.
        allowed: uint32 [n, words], or [n, 0] where every token is allowed.
        out: int32 [n], written.
    """
    edited, token_ids, scale, shift = edits
    blocks = (logits.shape[1] + BLOCK - 1) // BLOCK
    for place in prange(out.size):
        # In a thread's own code it has no sign, for which all that takes it would be compiled once more.
        r = np.int64(place)
        some = slice(first_from(edited, r, 0, edited.size), first_from(edited, r + 1, 0, edited.size))
        x = _edited(logits[index[r]], token_ids[some], scale[some], shift[some], allowed[r])
        out[r] = _sample_row(r, x, np.empty(blocks, np.float32), row_options, allowed[r])


@njit(nogil=True, cache=True)
def greatest_of_rows(logits, index, out):  # type: ignore[no-untyped-def]
    """As `sample_rows` with one thread, for rows that are all greedy, with neither edits nor masks.

    Args:
        logits: float32 [rows, vocab].
        index: int32 [n].
        out: int32 [n], written.
    """
    maxima = np.empty((logits.shape[1] + BLOCK - 1) // BLOCK, np.float32)
    for r in range(out.size):
        x = logits[index[r]]
        top = set_maxima(x, maxima)
        out[r] = 0 if top == NOTHING else rank_first(x, maxima, top)


@njit(**INNER)
def _insert(x, token, ids, count):  # type: ignore[no-untyped-def]
    """Put a token into its rank among ``ids[:count]``; tokens come by ascending id, so equals go behind."""
    place = count
    while place > 0 and x[ids[place - 1]] < x[token]:
        ids[place] = ids[place - 1]
        place -= 1
    ids[place] = token


@njit(**INNER)
def _set_top(x, maxima, top, ids):  # type: ignore[no-untyped-def]
    """Write the ``ids.size`` tokens that rank first, in order."""
    if ids.size == 0:
        return
    cut, cut_id = rank_cut(x, maxima, top, ids.size)
    found = 0
    for b in range(maxima.size):
        if maxima[b] >= cut:
            for token in range(b * BLOCK, min(x.size, (b + 1) * BLOCK)):
                if x[token] > cut or (x[token] == cut and token <= cut_id):
                    _insert(x, token, ids, found)
                    found += 1


@njit(**INNER)
def _difference(x, top):  # type: ignore[no-untyped-def]
    """``x - top``; 0 for the greatest even where it is infinite, -inf in a row that has nothing."""
    if x == NOTHING:
        return NOTHING
    return _ZERO if x == top else x - top


@njit(**INNER)
def _total_mass(x, maxima, top):  # type: ignore[no-untyped-def]
    """Mass of a whole row in units of 2**-40 of its greatest token; 0 where there is none."""
    if top == NOTHING:
        return np.int64(0)
    equal = np.int64(count_ties(x, maxima, top, x.size)) << options.MASS_BITS
    if top == np.inf:
        return equal
    _, below = masses(x, maxima, top, np.float32(1), top, NOTHING)
    return below


@njit(**INNER)
def _logprob_row(x, token, ids, differences):  # type: ignore[no-untyped-def]
    """Total mass, the token's difference and rank of one row without NaN; writes its likeliest tokens."""
    maxima = np.empty((x.size + BLOCK - 1) // BLOCK, np.float32)
    top = set_maxima(x, maxima)
    _set_top(x, maxima, top, ids)
    for i in range(ids.size):
        differences[i] = _difference(x[ids[i]], top)
    above = count_from(x, maxima, x[token]) - count_ties(x, maxima, x[token], x.size)
    rank = above + count_ties(x, maxima, x[token], token) + 1
    return _total_mass(x, maxima, top), _difference(x[token], top), rank


@njit(nogil=True, cache=True, parallel=True)
def logprob_rows(logits, index, token_ids, totals, differences, ranks, top_ids, top_differences):  # type: ignore[no-untyped-def]
    """What `options.log_probabilities` needs of each row, its token and its likeliest tokens.

    Args:
        logits: float32 [rows, vocab].
        index, token_ids: int32 [n].
        totals: int64 [n], written: the mass of each row.
        differences: float32 [n], written: the token's logit less the row's greatest.
        ranks: int32 [n], written: from 1.
        top_ids, top_differences: int32 and float32 [n, top], written.
    """
    for r in prange(index.size):
        x = logits[index[r]]
        if _holds_nan(x):
            x = _without_nan(x)
        totals[r], differences[r], ranks[r] = _logprob_row(x, token_ids[r], top_ids[r], top_differences[r])
