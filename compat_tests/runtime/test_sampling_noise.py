"""Tokens are drawn as often as their probability says, and draws know nothing of each other.

Each statistic has a fixed seed, and is shown to reject noise that is broken on purpose.
"""

import numpy as np
import pytest
import torch
from sampling_reference import Row, many_rows, mask_of, probabilities
from scipy import stats

from helix_gateway.core.step import LogitEdits
from helix_gateway.runtime.sampling import cpu_kernels, make_sampler, noise, torch_sampler
from helix_gateway.runtime.sampling.torch_sampler import TorchSampler

CPU = torch.device("cpu")
VOCABULARY = 12
DRAWS = 60_000
LOGITS = (np.random.default_rng(11).normal(size=VOCABULARY) * 1.5).astype(np.float32)
LIKELY = 1e-4
"""A sound statistic falls below this once in ten thousand seeds; a broken one is far below."""
IMPOSSIBLE = 1e-12


@pytest.fixture(params=["cpu", "torch"])
def kind(request):
    return request.param


def draw(kind, **options):
    """`DRAWS` tokens of the same row; counters as given, positions 0, 1, 2, ... where not."""
    sampler = make_sampler(CPU, VOCABULARY) if kind == "cpu" else TorchSampler(CPU, VOCABULARY)
    return sampler.sample(torch.from_numpy(LOGITS[None]), many_rows(DRAWS, VOCABULARY, **options))


def fit(tokens, expected):
    """p-value of the counts of tokens under the expected probabilities; 0 where an impossible token was drawn."""
    counts = np.bincount(tokens, minlength=expected.size)
    if counts[expected == 0].any():
        return 0.0
    possible = expected > 0
    if possible.sum() == 1:
        return 1.0
    return float(stats.chisquare(counts[possible], expected[possible] * tokens.size).pvalue)


def independence(first, second):
    """p-value of two series of tokens being independent of each other."""
    table = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(table, (first, second), 1)
    table = table[table.sum(axis=1) > 50][:, table.sum(axis=0) > 50]
    return float(stats.chi2_contingency(table).pvalue)


# ---- every option against its definition ----

BIAS = {2: (1.0, 1.0), 5: (1.0, -np.inf), 7: (1.3, 0.0), 0: (1.3, -0.4)}
OPTIONS = {
    "plain": {},
    "cool": {"temperature": 0.6},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "penalties, bias and bans": {"edits": BIAS},
    "grammar": {"allowed": {1, 3, 4, 8, 11}},
    "top_k, top_p": {"top_k": 6, "top_p": 0.9},
    "all": {
        "temperature": 1.4,
        "top_k": 7,
        "top_p": 0.93,
        "min_p": 0.05,
        "edits": BIAS,
        "allowed": set(range(1, VOCABULARY)),
    },
}


def arrays_of(options):
    """The same options as `many_rows` takes them."""
    arrays = {name: value for name, value in options.items() if name not in {"edits", "allowed"}}
    if "allowed" in options:
        arrays["allowed"] = np.tile(mask_of(options["allowed"], VOCABULARY), (DRAWS, 1))
    if "edits" in options:
        ids, pairs = list(options["edits"]), np.array(list(options["edits"].values()), np.float32)
        arrays["edits"] = LogitEdits(
            np.repeat(np.arange(DRAWS, dtype=np.int32), len(ids)),
            np.tile(np.array(ids, np.int32), DRAWS),
            np.tile(pairs[:, 0], DRAWS),
            np.tile(pairs[:, 1], DRAWS),
        )
    return arrays


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_come_as_often_as_the_definition_says(kind, name):
    tokens = draw(kind, seed=21, **arrays_of(OPTIONS[name]))
    assert fit(tokens, probabilities(LOGITS, Row(**OPTIONS[name]))) > LIKELY


@pytest.mark.parametrize("counter", ["seed", "choice", "position"])
def test_each_counter_alone_makes_fresh_draws(kind, counter):
    counters = {"seed": 3, "choice": 0, "position": 17, counter: np.arange(DRAWS)}
    assert fit(draw(kind, **counters), probabilities(LOGITS, Row())) > LIKELY


def test_a_wrong_temperature_would_be_seen(kind):
    assert fit(draw(kind, temperature=1.05), probabilities(LOGITS, Row())) < LIKELY


# ---- draws know nothing of each other ----


def test_neighbouring_positions_are_independent(kind):
    tokens = draw(kind, seed=5)
    assert independence(tokens[0::2], tokens[1::2]) > LIKELY
    assert independence(tokens[:-16], tokens[16:]) > LIKELY


def test_choices_of_one_request_are_independent(kind):
    assert independence(draw(kind, seed=6, choice=0), draw(kind, seed=6, choice=1)) > LIKELY


@pytest.mark.parametrize("bit", [0, 1, 15, 31, 32, 47, 63])
def test_seeds_that_differ_in_one_bit_are_independent(bit):
    seed = 0x0123456789ABCDEF
    assert independence(draw("cpu", seed=seed), draw("cpu", seed=seed ^ (1 << bit))) > LIKELY


def test_a_choice_is_not_a_position_and_a_seed_is_neither():
    streams = [
        draw("cpu", seed=1, choice=np.arange(DRAWS), position=1),
        draw("cpu", seed=1, choice=1, position=np.arange(DRAWS)),
        draw("cpu", seed=np.arange(DRAWS), choice=1, position=1),
    ]
    assert independence(streams[0], streams[1]) > LIKELY
    assert independence(streams[1], streams[2]) > LIKELY


# ---- the statistics see broken noise ----

SOUND_KEYS, SOUND_HASH, SOUND_TORCH_HASH = noise.row_keys, noise.hash_tokens, torch_sampler.hash_tokens


def _break_keys(monkeypatch, change):
    monkeypatch.setattr(noise, "row_keys", lambda *counters: SOUND_KEYS(*change(*counters)))


def _break_ids(monkeypatch, change):
    """Only where hashes are Python's to change; the compiled hash is held to the same bits below."""
    monkeypatch.setattr(noise, "hash_tokens", lambda ids, keys: SOUND_HASH(change(ids), keys))
    monkeypatch.setattr(torch_sampler, "hash_tokens", lambda ids, *keys: SOUND_TORCH_HASH(change(ids), *keys))


def test_noise_that_ignores_the_position_is_seen(kind, monkeypatch):
    _break_keys(monkeypatch, lambda seed, choice, position: (seed, choice, position * 0))
    assert fit(draw(kind, seed=3), probabilities(LOGITS, Row())) < IMPOSSIBLE


def test_noise_that_counts_positions_in_pairs_is_seen(kind, monkeypatch):
    _break_keys(monkeypatch, lambda seed, choice, position: (seed, choice, position // 2))
    tokens = draw(kind, seed=3)
    assert independence(tokens[0::2], tokens[1::2]) < IMPOSSIBLE


def test_noise_that_ignores_the_choice_is_seen(kind, monkeypatch):
    _break_keys(monkeypatch, lambda seed, choice, position: (seed, choice * 0, position))
    assert independence(draw(kind, choice=0), draw(kind, choice=1)) < IMPOSSIBLE


@pytest.mark.parametrize("bit", [32, 63])
def test_noise_of_the_seed_s_low_bits_is_seen(kind, bit, monkeypatch):
    _break_keys(monkeypatch, lambda seed, choice, position: (seed & np.uint64(0xFFFFFFFF), choice, position))
    seed = 0x0123456789ABCDEF
    assert independence(draw(kind, seed=seed), draw(kind, seed=seed ^ (1 << bit))) < IMPOSSIBLE


def test_noise_that_ignores_the_token_is_seen(monkeypatch):
    _break_ids(monkeypatch, lambda ids: ids * 0)
    assert fit(draw("torch"), probabilities(LOGITS, Row())) < IMPOSSIBLE


def test_noise_that_two_neighbouring_tokens_share_is_seen(monkeypatch):
    _break_ids(monkeypatch, lambda ids: ids // 2)
    assert fit(draw("torch"), probabilities(LOGITS, Row())) < IMPOSSIBLE


def test_noise_of_one_key_is_seen_where_rows_permute_each_other(monkeypatch):
    """With the first key alone, rows whose keys differ in low bits only would hold the same numbers in another order."""
    ids, keys = np.arange(64, dtype=np.int32)[None].repeat(2, 0), np.array([[9, 9 ^ 5], [1, 1]], np.uint32)
    same = noise.hash_tokens(ids, keys)
    assert sorted(same[0]) == sorted(same[1])
    keys[1, 1] = 2
    other = noise.hash_tokens(ids, keys)
    assert not set(other[0]) & set(other[1])


# ---- the hash ----


def by_hand(token_id, first, second):
    """The hash in Python's whole numbers."""
    word = 2**32
    x = token_id ^ first
    x = (x ^ x >> 16) * 0x7FEB352D % word
    x = (x ^ x >> 15 ^ second) * 0x21F0AAAD % word
    x = (x ^ x >> 15) * 0x31848BAB % word
    return x ^ x >> 16


def test_the_hash_has_the_same_bits_everywhere():
    random = np.random.default_rng(12)
    ids = random.integers(0, 2**20, (40, 25)).astype(np.int32)
    keys = random.integers(0, 2**32, (2, 40), dtype=np.uint32)
    keys[:, :4] = [[0, 0, 2**32 - 1, 2**32 - 1], [0, 2**32 - 1, 0, 2**32 - 1]]
    expected = [[by_hand(int(t), int(a), int(b)) for t in row] for row, a, b in zip(ids, *keys, strict=True)]
    on_host = noise.hash_tokens(ids, keys)
    columns = [torch.from_numpy(k.astype(np.int64)).unsqueeze(1) for k in keys]
    in_torch = torch_sampler.hash_tokens(torch.from_numpy(ids.astype(np.int64)), *columns)
    compiled = [
        [int(cpu_kernels._hash(np.uint32(t) ^ a, b)) for t in row] for row, a, b in zip(ids, *keys, strict=True)
    ]
    assert on_host.tolist() == expected
    assert in_torch.tolist() == expected
    assert compiled == expected


def test_no_product_of_the_hash_leaves_63_bits():
    assert all((2**32 - 1) * m < 2**63 and m % 2 for m in noise.MULTIPLIERS)


def flips(change, inputs):
    """Share of cases in which each output bit flips when ``change`` is made: [32]."""
    before, after = (noise.hash_tokens(ids, noise.row_keys(*counters)) for ids, counters in (inputs, change(inputs)))
    return np.unpackbits((before ^ after).view(np.uint8).reshape(-1, 4), axis=1).mean(axis=0)


@pytest.mark.parametrize("what, bits", [("token", 18), ("seed", 64), ("choice", 8), ("position", 21)])
def test_one_bit_of_any_input_flips_half_of_the_bits(what, bits):
    random, n = np.random.default_rng(13), 20_000
    ids = random.integers(0, 2**18, (n, 1)).astype(np.int32)
    seed = random.integers(0, 2**64, n, dtype=np.uint64)
    choice, position = random.integers(0, 128, n).astype(np.int32), random.integers(0, 2**20, n).astype(np.int32)

    def flipped(bit, inputs):
        ids, (seed, choice, position) = inputs
        one = np.int32(1 << bit) if bit < 31 else None
        return {
            "token": lambda: (ids ^ one, (seed, choice, position)),
            "seed": lambda: (ids, (seed ^ np.uint64(1 << bit), choice, position)),
            "choice": lambda: (ids, (seed, choice ^ one, position)),
            "position": lambda: (ids, (seed, choice, position ^ one)),
        }[what]()

    inputs = (ids, (seed, choice, position))
    for bit in range(bits):
        shares = flips(lambda inputs, bit=bit: flipped(bit, inputs), inputs)
        assert shares.min() > 0.48
        assert shares.max() < 0.52


def test_hashes_of_a_row_are_uniform_and_neighbours_unrelated():
    ids = np.arange(49_152, dtype=np.int32)[None]
    for seed in range(4):
        keys = noise.row_keys(np.array([seed], np.uint64), np.zeros(1, np.int32), np.zeros(1, np.int32))
        u = (noise.hash_tokens(ids, keys)[0] + 0.5) * 2.0**-32
        assert stats.kstest(u, "uniform").pvalue > LIKELY
        for lag in (1, 2, 16, 256):
            cells = np.histogram2d(u[:-lag], u[lag:], bins=16, range=[[0, 1], [0, 1]])[0]
            assert stats.chisquare(cells.ravel()).pvalue > LIKELY


def test_no_two_counters_of_a_seed_share_their_keys():
    choice, position = np.meshgrid(np.arange(8), np.arange(20_000))
    keys = noise.row_keys(
        np.full(choice.size, 77, np.uint64), choice.ravel().astype(np.int32), position.ravel().astype(np.int32)
    )
    whole = keys[0].astype(np.uint64) << np.uint64(32) | keys[1]
    assert np.unique(whole).size == choice.size


def test_noise_is_gumbel_s_and_the_bound_is_above_it():
    hashes = np.concatenate(
        [
            np.array([0, 1, 2, 127, 2**31, 2**32 - 1, 2**32 - 2, 2**32 - 3], np.uint32),
            np.random.default_rng(14).integers(0, 2**32, 50_000, dtype=np.uint32),
        ]
    )
    g = noise.gumbel(hashes)
    assert np.isfinite(g).all()
    assert g.max() < noise.MAX_NOISE
    assert stats.kstest(g[8:], stats.gumbel_r.cdf).pvalue > LIKELY
    bounds = np.array([cpu_kernels._noise_bound(h) for h in hashes])
    assert (bounds > g - float(cpu_kernels._SLACK) / 2).all()
    in_float32 = torch_sampler.gumbel(torch.from_numpy(hashes.astype(np.int64))).numpy()
    np.testing.assert_allclose(in_float32, g, rtol=0, atol=1e-5)
