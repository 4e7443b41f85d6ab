"""Compiled sampling for a CPU: from rows of float32 logits to token ids, and to log-probabilities, without a sort.

**Order.**  Tokens of a row are ranked by (logit descending, id ascending).  Every filter (min-p, top-k, top-p) keeps
a prefix of that order, so what is kept is told by a `cut`: the logit and the id of the last token kept.

**Why the search is exact.**  A token's score is ``(x - max) / T + g``, and its noise g does not depend on what is
kept.  So the best of a prefix is found by searching a longer prefix: if the best of the longer one lies in the
shorter, it is the best there too.  If it does not, then neither it nor anything ranked below it is kept, the cut
rises above it, and the search goes on in what is left, which still holds the whole shorter prefix.  Top-k and min-p
are cut at once, since their cut is cheap to find; top-p is only asked whether it keeps the winner (the mass ranked
above it is below the share), which takes one pass in the usual case and no sort ever.

**Why it is fast.**  The noise is not greater than ``-log(1 - u)``, whose logarithm's bits are almost those of the
float: the loop over all tokens is a hash, a multiply-add and a comparison with the best so far, on vectors.  Two
logarithms in float64 are taken for the few that pass.  Blocks of 256 tokens of which not even the greatest could win
are not hashed at all.

**Why it is the same every time.**  Each row is computed by one thread from its own values; the best is a maximum and
masses are integers, so no order of evaluation can show.  NaN counts as -inf everywhere: every comparison with it is
false.  Slices of blocks stand where an index into the row could stand, since numba then knows that no index is
negative and LLVM can load whole vectors.

Knows nothing about torch or requests.  The hash is `noise.hash_tokens`; this file repeats it so that numba's cache,
which looks at one file, is never stale.
"""

import math

import numpy as np
from numba import njit, prange

from helix_gateway.runtime.cpu.math import exp_f32
from helix_gateway.runtime.cpu.microkernels import bits_of, float_of
from helix_gateway.runtime.sampling import noise, options

BLOCK = 256
"""Tokens looked at together (measured: benchmarks/sampling_bench.py)."""

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

_NOTHING = np.float32(-np.inf)
_ZERO = np.float32(0)
_MANTISSA_AND_EXPONENT = np.int32(0x7FFFFFFF)
_SIGN_SHIFT = np.int32(31)
_KEY_OF_NOTHING = np.int32((0xFF800000 - 2**32) ^ 0x7FFFFFFF)


_NONE = np.int32(0)
_HALF_BITS = options.MASS_BITS // 2
_HALF_MASS = np.float32(2.0**_HALF_BITS)
# exp of less than this, in units of 2**-40, is zero whole ones.
_NO_MASS_BELOW = np.float32(-math.log(2) * options.MASS_BITS - 1)
_SHARE_BITS = options.SHARE_BITS
_WHOLE = 1 << options.SHARE_BITS


@njit
def _hash(x, second_key):  # type: ignore[no-untyped-def]
    """32 bits of ``x = token id ^ first key`` under the second key; as `noise.hash_tokens`."""
    x = np.uint32(np.uint32(x ^ np.uint32(x >> _S1)) * _M1)
    x = np.uint32(np.uint32(np.uint32(x ^ np.uint32(x >> _S2)) ^ second_key) * _M2)
    x = np.uint32(np.uint32(x ^ np.uint32(x >> _S3)) * _M3)
    return np.uint32(x ^ np.uint32(x >> _S4))


@njit
def _gumbel(h):  # type: ignore[no-untyped-def]
    """Noise of a hash in float64; as `noise.gumbel`."""
    return -math.log(-math.log((np.float64(h) + 0.5) * 2.0**-32))


@njit
def _noise_bound(h):  # type: ignore[no-untyped-def]
    """A float32 that the noise of a hash does not exceed by more than rounding."""
    k = np.float32(np.int32(np.uint32(~h) >> _ONE))
    return _NOISE_AT_ZERO_BITS + _NOISE_A_BIT * np.float32(np.int32(bits_of(k)))


@njit
def _key(x):  # type: ignore[no-untyped-def]
    """An int32 that orders as the float32 does; both zeros are one, NaN is -inf."""
    bits = np.int32(bits_of(x + _ZERO))
    key = np.int32(bits ^ np.int32(np.int32(bits >> _SIGN_SHIFT) & _MANTISSA_AND_EXPONENT))
    return key if x == x else _KEY_OF_NOTHING


@njit
def _value(key):  # type: ignore[no-untyped-def]
    """The float32 of a key."""
    narrow = np.int32(key)
    return float_of(np.uint32(narrow ^ np.int32(np.int32(narrow >> _SIGN_SHIFT) & _MANTISSA_AND_EXPONENT)))


@njit
def _block(x, b):  # type: ignore[no-untyped-def]
    return x[b * BLOCK : min(x.size, (b + 1) * BLOCK)]


@njit
def _set_maxima(x, maxima):  # type: ignore[no-untyped-def]
    """Write each block's greatest logit, return the row's."""
    top = _KEY_OF_NOTHING
    for b in range(maxima.size):
        block = _block(x, b)
        most = _KEY_OF_NOTHING
        for i in range(block.size):
            key = _key(block[i])
            most = np.int32(key if key > most else most)
        maxima[b] = _value(most)
        top = max(top, most)
    return _value(top)


@njit
def _rank_first(x, maxima, top):  # type: ignore[no-untyped-def]
    """The lowest id of the greatest logit, which the row holds."""
    b = 0
    while maxima[b] != top:
        b += 1
    token = b * BLOCK
    while x[token] != top:
        token += 1
    return token


@njit
def _count_block(block, least):  # type: ignore[no-untyped-def]
    count = np.int32(0)
    for i in range(block.size):
        count = np.int32(count + np.int32(block[i] >= least))
    return np.int64(count)


@njit
def _count(x, maxima, least):  # type: ignore[no-untyped-def]
    """How many logits are ``least`` or more."""
    count = 0
    for b in range(maxima.size):
        if maxima[b] >= least:
            count += _count_block(_block(x, b), least)
    return count


@njit
def _ties(x, maxima, value, before):  # type: ignore[no-untyped-def]
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


@njit
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


@njit
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


@njit
def _rank_cut(x, maxima, top, k):  # type: ignore[no-untyped-def]
    """Logit and id of the token of rank ``k``, or of any cut that keeps exactly ``k``; by halving, no sort."""
    low, high = np.int64(_KEY_OF_NOTHING), np.int64(_key(top)) + 1
    if k <= maxima.size:
        low = _least_block_key(maxima, k, _key(top))
    above = 0
    while high - low > 1:
        middle = (low + high) >> 1
        count = _count(x, maxima, _value(middle))
        if count == k:
            return _value(middle), x.size - 1
        if count > k:
            low = middle
        else:
            high, above = middle, count
    return _value(low), _nth_tie(x, maxima, _value(low), k - above)


@njit
def _min_p_cut(top, min_difference):  # type: ignore[no-untyped-def]
    """The least logit whose float32 difference to the greatest is ``min_difference`` or more."""
    low, high = np.int64(_KEY_OF_NOTHING), np.int64(_key(top))
    while high - low > 1:
        middle = (low + high) >> 1
        if _value(middle) - top >= min_difference:
            high = middle
        else:
            low = middle
    return _value(high)


@njit
def _mass(x, top, factor):  # type: ignore[no-untyped-def]
    """``floor(2**40 * exp((x - top) * factor))`` in two halves of 20 bits, high and low, since vectors are of int32."""
    scaled = exp_f32((x - top) * factor) * _HALF_MASS
    high = np.int32(scaled)
    return high, np.int32((scaled - np.float32(high)) * _HALF_MASS)


@njit
def _whole_mass(x, top, factor):  # type: ignore[no-untyped-def]
    high, low = _mass(x, top, factor)
    return (np.int64(high) << _HALF_BITS) + low


@njit
def _block_masses(block, top, factor, upper, lower):  # type: ignore[no-untyped-def]
    """As `_masses`, of one block; 256 halves of at most 2**20 fit an int32."""
    upper_high = upper_low = lower_high = lower_low = _NONE
    for i in range(block.size):
        logit = block[i]
        high, low = _mass(logit, top, factor)
        upper_high = np.int32(upper_high + (high if logit > upper else _NONE))
        upper_low = np.int32(upper_low + (low if logit > upper else _NONE))
        lower_high = np.int32(lower_high + (high if logit > lower else _NONE))
        lower_low = np.int32(lower_low + (low if logit > lower else _NONE))
    return (np.int64(upper_high) << _HALF_BITS) + upper_low, (np.int64(lower_high) << _HALF_BITS) + lower_low


@njit
def _masses(x, maxima, top, factor, upper, lower):  # type: ignore[no-untyped-def]
    """Masses of all tokens above ``upper``, and of all above ``lower``, which is not greater."""
    above_upper = above_lower = np.int64(0)
    for b in range(maxima.size):
        if maxima[b] > lower and (maxima[b] - top) * factor > _NO_MASS_BELOW:
            some_upper, some_lower = _block_masses(_block(x, b), top, factor, upper, lower)
            above_upper += some_upper
            above_lower += some_lower
    return above_upper, above_lower


@njit
def _share_of(total, share):  # type: ignore[no-untyped-def]
    """``ceil(total * share / 2**30)`` without a product beyond 63 bits."""
    rest = (total & (_WHOLE - 1)) * share
    return (total >> _SHARE_BITS) * share + ((rest + _WHOLE - 1) >> _SHARE_BITS)


@njit
def _may_win(block, top, factor, hashed, second_key, cut, limit):  # type: ignore[no-untyped-def]
    """Whether the bound of any token of the block that the cut may keep exceeds ``limit``."""
    hit = np.int32(0)
    for i in range(block.size):
        logit = block[i]
        bound = (logit - top) * factor + _noise_bound(_hash(np.uint32(_OFFSETS[i] ^ hashed), second_key))
        hit = np.int32(hit | (np.int32(bound > limit) & np.int32(logit >= cut)))
    return hit != 0


@njit
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


@njit
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
        if _may_win(_block(x, b), top, factor, hashed, second_key, cut, limit):
            best, best_id = _best_of_block(x, b, top, factor, first_key, second_key, cut, cut_id, best, best_id)
    return best_id


@njit
def _choose(x, maxima, top, factor, first_key, second_key, top_k, share, min_difference):  # type: ignore[no-untyped-def]
    """The noisy best among what min-p, top-k and top-p keep of one row."""
    cut, cut_id = _NOTHING, np.int64(x.size - 1)
    if top_k < x.size:
        cut, cut_id = _rank_cut(x, maxima, top, top_k)
    if min_difference > _NOTHING:
        least = _min_p_cut(top, min_difference)
        if least > cut:
            cut, cut_id = least, np.int64(x.size - 1)
    lower, lower_id = cut, cut_id
    while True:
        token = _noisy_best(x, maxima, top, factor, first_key, second_key, cut, cut_id)
        if share == _WHOLE or token == x.size:
            return token
        logit = x[token]
        above, kept = _masses(x, maxima, top, factor, logit, lower)
        above += _ties(x, maxima, logit, token) * _whole_mass(logit, top, factor)
        kept += _ties(x, maxima, lower, lower_id + 1) * _whole_mass(lower, top, factor)
        if above < max(_share_of(kept, share), 1):
            return token
        cut, cut_id = logit, np.int64(token - 1)


@njit
def _clean(x, out):  # type: ignore[no-untyped-def]
    """Copy a row, NaN becomes -inf."""
    for i in range(out.size):
        out[i] = x[i] if x[i] == x[i] else _NOTHING


@njit
def _edit(out, token_ids, scale, shift):  # type: ignore[no-untyped-def]
    """``x = (x / scale if x > 0 else x * scale) + shift`` for some tokens of a row; NaN becomes -inf."""
    for i in range(token_ids.size):
        x = out[token_ids[i]]
        x = (x / scale[i] if x > _ZERO else x * scale[i]) + shift[i]
        out[token_ids[i]] = x if x == x else _NOTHING


@njit
def _allow(out, words):  # type: ignore[no-untyped-def]
    """Ban every token whose bit is not set."""
    for w in range(words.size):
        some = out[w * 32 : min(out.size, (w + 1) * 32)]
        word = words[w]
        for i in range(some.size):
            some[i] = some[i] if np.uint32(word >> np.uint32(i)) & _ONE else _NOTHING


@njit
def _first_allowed(words):  # type: ignore[no-untyped-def]
    """The lowest set bit, or 0."""
    for w in range(words.size):
        for i in range(32):
            if np.uint32(words[w] >> np.uint32(i)) & _ONE:
                return w * 32 + i
    return 0


@njit
def _sample_row(  # type: ignore[no-untyped-def]
    r, logits, index, keys, greedy, factor, top_k, share, min_difference, edits, allowed, scratch, maxima
):
    """One row, see `sample_rows`."""
    starts, token_ids, scale, shift = edits
    x = logits[index[r]]
    first, last = starts[r], starts[r + 1]
    if last > first or allowed.shape[0] > 0:
        _clean(x, scratch[r])
        x = scratch[r]
        _edit(x, token_ids[first:last], scale[first:last], shift[first:last])
        if allowed.shape[0] > 0:
            _allow(x, allowed[r])
    top = _set_maxima(x, maxima[r])
    if top == _NOTHING:
        return _first_allowed(allowed[r]) if allowed.shape[0] > 0 else 0
    if greedy[r] or top == np.inf:
        return _rank_first(x, maxima[r], top)
    return _choose(x, maxima[r], top, factor[r], keys[0, r], keys[1, r], top_k[r], share[r], min_difference[r])


@njit(nogil=True, cache=True, parallel=True)
def sample_rows(  # type: ignore[no-untyped-def]
    logits, index, keys, greedy, factor, top_k, share, min_difference, edits, allowed, scratch, maxima, out
):
    """Choose one token a row, rows spread over the threads.

    Args:
        logits: float32 [rows, vocab].
        index: int32 [n].
        keys, greedy, factor, top_k, share, min_difference: `options.RowOptions`.
        edits: int64 [n + 1] where each row's edits begin, then token ids, scale and shift as `LogitEdits`.
        allowed: uint32 [n, words], or [0, words] where every token is allowed.
        scratch: float32 [n, vocab] where there are edits or masks, of which edited rows are written.
        maxima: float32 [n, blocks], written.
        out: int32 [n], written.
    """
    for r in prange(out.size):
        out[r] = _sample_row(
            r, logits, index, keys, greedy, factor, top_k, share, min_difference, edits, allowed, scratch, maxima
        )


@njit
def _insert(x, token, ids, count):  # type: ignore[no-untyped-def]
    """Put a token into its rank among ``ids[:count]``; tokens come by ascending id, so equals go behind."""
    place = count
    while place > 0 and x[ids[place - 1]] < x[token]:
        ids[place] = ids[place - 1]
        place -= 1
    ids[place] = token


@njit
def _set_top(x, maxima, top, ids):  # type: ignore[no-untyped-def]
    """Write the ``ids.size`` tokens that rank first, in order."""
    cut, cut_id = _rank_cut(x, maxima, top, ids.size)
    count = 0
    for b in range(maxima.size):
        if maxima[b] >= cut:
            for token in range(b * BLOCK, min(x.size, (b + 1) * BLOCK)):
                if x[token] > cut or (x[token] == cut and token <= cut_id):
                    _insert(x, token, ids, count)
                    count += 1


@njit
def _difference(x, top):  # type: ignore[no-untyped-def]
    """``x - top``; 0 for the greatest even where it is infinite, -inf in a row that has nothing."""
    if x == _NOTHING:
        return _NOTHING
    return _ZERO if x == top else x - top


@njit
def _total_mass(x, maxima, top):  # type: ignore[no-untyped-def]
    """Mass of a whole row in units of 2**-40 of its greatest token; 0 where there is none."""
    if top == _NOTHING:
        return np.int64(0)
    equal = np.int64(_ties(x, maxima, top, x.size)) << options.MASS_BITS
    if top == np.inf:
        return equal
    _, below = _masses(x, maxima, top, np.float32(1), top, _NOTHING)
    return below


@njit(nogil=True, cache=True, parallel=True)
def logprob_rows(logits, index, token_ids, scratch, maxima, totals, differences, ranks, top_ids, top_differences):  # type: ignore[no-untyped-def]
    """What `options.log_probabilities` needs of each row, its token and its likeliest tokens.

    Args:
        logits: float32 [rows, vocab].
        index, token_ids: int32 [n].
        scratch: float32 [n, vocab], written.
        maxima: float32 [n, blocks], written.
        totals: int64 [n], written: the mass of each row.
        differences: float32 [n], written: the token's logit less the row's greatest.
        ranks: int32 [n], written: from 1.
        top_ids, top_differences: int32 and float32 [n, top], written.
    """
    for r in prange(index.size):
        x, token = scratch[r], token_ids[r]
        _clean(logits[index[r]], x)
        top = _set_maxima(x, maxima[r])
        totals[r] = _total_mass(x, maxima[r], top)
        differences[r] = _difference(x[token], top)
        equal = _ties(x, maxima[r], x[token], x.size)
        above = _count(x, maxima[r], x[token]) - equal
        ranks[r] = above + _ties(x, maxima[r], x[token], token) + 1
        _set_top(x, maxima[r], top, top_ids[r])
        for i in range(top_ids.shape[1]):
            top_differences[r, i] = _difference(x[top_ids[r, i]], top)
