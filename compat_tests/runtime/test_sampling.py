"""A token is what the definition says, on every device, whatever else is in the batch."""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import Row, edited, many_rows, reference_token, sampling_rows

from compat_tests.effort import deeply
from helix_gateway.core.errors import HelixError
from helix_gateway.runtime import sampling
from helix_gateway.runtime.sampling import make_sampler, torch_sampler
from helix_gateway.runtime.sampling.cpu_sampler import CpuSampler
from helix_gateway.runtime.sampling.torch_sampler import TorchSampler

CPU = torch.device("cpu")


def sampler_of(kind, vocab_size):
    return make_sampler(CPU, vocab_size) if kind == "cpu" else TorchSampler(CPU, vocab_size)


@pytest.fixture(params=["cpu", "torch"])
def kind(request):
    return request.param


def test_a_cpu_gets_the_compiled_sampler_and_others_torch_operators(monkeypatch):
    monkeypatch.setattr(sampling, "TorchSampler", lambda device, vocab_size: (device.type, vocab_size))
    assert isinstance(make_sampler(CPU, 10), CpuSampler)
    assert make_sampler(torch.device("mps"), 10) == ("mps", 10)


def test_a_device_that_divides_integers_through_float_shifts_instead(monkeypatch):
    monkeypatch.setattr(torch_sampler, "by_division", lambda x, bits: (x.float() / 2**bits).long())
    assert torch_sampler.exact_shift(CPU) is torch_sampler.by_shift


def test_a_device_without_division_shifts_instead(monkeypatch):
    def missing(x, bits):
        raise NotImplementedError("as a device says it of an operator that it lacks")

    monkeypatch.setattr(torch_sampler, "by_division", missing)
    assert torch_sampler.exact_shift(CPU) is torch_sampler.by_shift


def test_a_device_that_can_do_neither_is_refused(monkeypatch):
    for name in ("by_division", "by_shift"):
        monkeypatch.setattr(torch_sampler, name, lambda x, bits: x)
    with pytest.raises(HelixError, match="64-bit integers"):
        torch_sampler.exact_shift(CPU)


# ---- equality with the definition ----

VOCABULARIES = (1, 2, 5, 31, 32, 33, 127, 128, 129, 257, 700, 1500)


@st.composite
def rows_of(draw, vocab_size, num_logits):
    token = st.integers(0, vocab_size - 1)
    return Row(
        logits_index=draw(st.integers(0, num_logits - 1)),
        seed=draw(st.integers(0, 2**64 - 1)),
        choice=draw(st.integers(0, 3)),
        position=draw(st.integers(0, 2**20)),
        temperature=draw(st.sampled_from((0.0, 0.05, 0.3, 0.7, 1.0, 1.0, 1.5, 5.0))),
        top_k=draw(st.sampled_from((None, None, 1, 2, 3, 10, 50, 300, 1000))),
        top_p=draw(st.sampled_from((1.0, 1.0, 0.05, 0.3, 0.5, 0.9, 0.95))),
        min_p=draw(st.sampled_from((0.0, 0.0, 0.001, 0.05, 0.5, 1.0))),
        edits=draw(
            st.dictionaries(
                token,
                st.tuples(st.sampled_from((1.0, 1.2, 0.8)), st.sampled_from((0.0, -1.5, 2.0, -np.inf))),
                max_size=5,
            )
        ),
        allowed=draw(st.one_of(st.none(), st.none(), st.sets(token, min_size=1, max_size=40))),
    )


@st.composite
def batches(draw):
    vocab_size, num_logits = draw(st.sampled_from(VOCABULARIES)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = random.normal(size=(num_logits, vocab_size)) * draw(st.sampled_from((0.1, 1.0, 4.0, 30.0)))
    if draw(st.booleans()):
        logits = np.round(logits)
    if draw(st.booleans()):
        odd = random.random(logits.shape) < 0.2
        logits[odd] = random.choice([np.nan, -np.inf, 0.0, -0.0, 3.0], size=odd.sum())
    if draw(st.integers(0, 9)) == 0:
        logits[0, random.integers(vocab_size)] = np.inf
    rows = draw(st.lists(rows_of(vocab_size, num_logits), min_size=1, max_size=6))
    return logits.astype(np.float32), rows


@settings(max_examples=deeply(250, 5000), deadline=None, derandomize=True)
@given(batches())
def test_every_option_gives_the_token_that_the_definition_says(batch):
    logits, rows = batch
    expected = [reference_token(logits[row.logits_index], row) for row in rows]
    flat = sampling_rows(rows, logits.shape[1])
    for kind in ("cpu", "torch"):
        chosen = sampler_of(kind, logits.shape[1]).sample(torch.from_numpy(logits), flat)
        assert chosen.dtype == np.int32
        assert chosen.tolist() == expected, kind


@settings(max_examples=deeply(150, 3000), deadline=None, derandomize=True)
@given(batches())
def test_greedy_rows_among_themselves_give_the_token_that_the_definition_says(batch):
    logits, _ = batch
    rows = [Row(logits_index=i, temperature=0.0, top_k=3, min_p=0.1) for i in reversed(range(len(logits)))]
    expected = [reference_token(logits[row.logits_index], row) for row in rows]
    for kind in ("cpu", "torch"):
        sampler = sampler_of(kind, logits.shape[1])
        assert sampler.sample(torch.from_numpy(logits), sampling_rows(rows, logits.shape[1])).tolist() == expected, kind


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 50}, {"top_k": 9000}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 100, "top_p": 0.5, "min_p": 0.001}],
    ids=str,
)
def test_a_real_vocabulary_gives_the_token_that_the_definition_says(kind, options):
    logits = (np.random.default_rng(1).normal(size=(3, 20_001)) * 2).astype(np.float32)
    rows = [Row(logits_index=i % 3, seed=i, position=9 * i, **options) for i in range(12)]
    chosen = sampler_of(kind, 20_001).sample(torch.from_numpy(logits), sampling_rows(rows, 20_001))
    assert chosen.tolist() == [reference_token(logits[row.logits_index], row) for row in rows]


# ---- the batch does not show ----


def mixed_rows(count):
    """Rows with every option, of which no two are alike."""
    some = [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.0}, {"edits": {3: (1.3, -1.0)}}]
    return [Row(logits_index=i, seed=i * 7919, position=i, **some[i % len(some)]) for i in range(count)]


def test_a_row_alone_gets_what_it_gets_among_31_others(kind):
    logits = torch.from_numpy(np.random.default_rng(2).normal(size=(32, 1000)).astype(np.float32))
    rows = mixed_rows(32)
    sampler = sampler_of(kind, 1000)
    together = sampler.sample(logits, sampling_rows(rows, 1000))
    alone = [int(sampler.sample(logits, sampling_rows([row], 1000))[0]) for row in rows]
    backwards = sampler.sample(logits, sampling_rows(rows[::-1], 1000))[::-1]
    assert together.tolist() == alone == backwards.tolist()


def test_the_number_of_threads_does_not_show():
    logits = torch.from_numpy(np.random.default_rng(3).normal(size=(32, 5000)).astype(np.float32))
    rows, before = sampling_rows(mixed_rows(32), 5000), numba.get_num_threads()
    try:
        answers = []
        for threads in {1, before}:
            numba.set_num_threads(threads)
            answers.append(
                [make_sampler(CPU, 5000).sample(logits[:n], _first(rows, n)).tolist() for n in (1, 2, 3, 32)]
            )
    finally:
        numba.set_num_threads(before)
    assert all(answer == answers[0] for answer in answers)


def _first(rows, count):
    """The first ``count`` of some sampling rows."""
    arrays = {
        name: getattr(rows, name)[:count]
        for name in ("logits_index", "seed", "choice", "position", "temperature", "top_k", "top_p", "min_p")
    }
    stay = rows.edits.rows < count
    edits = type(rows.edits)(*(getattr(rows.edits, n)[stay] for n in ("rows", "token_ids", "scale", "shift")))
    return type(rows)(edits=edits, **arrays)


def test_logits_stay_as_they_were(kind):
    logits = torch.from_numpy(np.random.default_rng(4).normal(size=(6, 300)).astype(np.float32))
    logits[2, 7] = torch.nan
    before = logits.clone()
    rows = [*mixed_rows(6), Row(logits_index=1, allowed={4, 5}, edits={4: (2.0, -1.0)})]
    sampler = sampler_of(kind, 300)
    sampler.sample(logits, sampling_rows(rows, 300))
    sampler.logprobs(logits, np.arange(6, dtype=np.int32), np.arange(6, dtype=np.int32), 3)
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32))


def test_rows_in_any_order_and_more_than_once(kind):
    logits = torch.from_numpy(np.random.default_rng(5).normal(size=(4, 100)).astype(np.float32))
    rows = [Row(logits_index=i, seed=5, position=1) for i in (3, 0, 3, 2)]
    chosen = sampler_of(kind, 100).sample(logits, sampling_rows(rows, 100))
    assert chosen[0] == chosen[2]
    assert chosen.tolist() == [reference_token(logits[row.logits_index].numpy(), row) for row in rows]


def test_no_rows_give_no_tokens(kind):
    chosen = sampler_of(kind, 100).sample(torch.zeros(0, 100), sampling_rows([], 100))
    assert chosen.shape == (0,)
    assert chosen.dtype == np.int32


# ---- rows that hold something odd ----


def one(kind, logits, **options):
    logits = np.asarray(logits, np.float32)
    rows = sampling_rows([Row(**options)], logits.size)
    return int(sampler_of(kind, logits.size).sample(torch.from_numpy(logits[None]), rows)[0])


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logits, options, expected",
    [
        ([-INF] * 5, {}, 0),
        ([NAN] * 5, {}, 0),
        ([NAN, -INF, NAN], {"allowed": {2}}, 2),
        ([1.0, 2.0, 3.0], {"allowed": {1}}, 1),
        ([NAN, 1.0, NAN], {}, 1),
        ([0.0, INF, 5.0, INF], {}, 1),
        ([5.0, 4.0, 3.0], {"edits": {0: (1.0, -INF), 1: (1.0, -INF)}}, 2),
        ([5.0], {"top_p": 0.0}, 0),
        ([-3e38, 3e38, 0.0], {}, 1),
        ([-1e30, -2e30, -3e30], {}, 0),
    ],
)
def test_an_odd_row_gives_an_id_in_range(kind, logits, options, expected, temperature):
    assert one(kind, logits, temperature=temperature, **options) == expected


def test_temperature_zero_takes_the_lowest_id_of_the_likeliest(kind):
    logits = np.zeros(600, np.float32)
    logits[[300, 301, 599]] = 2.0
    for seed in range(5):
        assert one(kind, logits, temperature=0.0, seed=seed) == 300
    assert one(kind, logits, temperature=0.0, edits={300: (1.0, -INF)}) == 301


def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform(kind):
    logits = np.linspace(0, 1, 50)
    assert one(kind, logits, temperature=1e-38) == 49
    rows = many_rows(5000, 50, temperature=1e38)
    chosen = sampler_of(kind, 50).sample(torch.from_numpy(logits.astype(np.float32))[None], rows)
    assert np.bincount(chosen, minlength=50).min() > 50


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_the_tightest_filter_leaves_the_likeliest(kind, option):
    logits = np.random.default_rng(6).normal(size=2000)
    for seed in range(5):
        assert one(kind, logits, seed=seed, **option) == logits.argmax()


def test_equal_logits_at_the_edge_of_top_k_are_kept_by_ascending_id(kind):
    logits = torch.zeros(1, 1000)
    chosen = sampler_of(kind, 1000).sample(logits, many_rows(2000, 1000, top_k=7))
    assert set(chosen.tolist()) == set(range(7))


def test_equal_logits_at_the_edge_of_top_p_are_kept_by_ascending_id(kind):
    chosen = sampler_of(kind, 8).sample(torch.zeros(1, 8), many_rows(2000, 8, top_p=0.5))
    assert set(chosen.tolist()) == set(range(4))


def test_top_p_counts_the_mass_that_top_k_left(kind):
    # of 0.4, 0.3, 0.2, 0.1 the first two are 4/7 and 3/7 of what is left: 0.5 of it is the first alone
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    chosen = sampler_of(kind, 4).sample(logits, many_rows(500, 4, top_k=2, top_p=0.5))
    assert set(chosen.tolist()) == {0}


def test_min_p_is_of_the_distribution_after_temperature(kind):
    logits = torch.tensor([[0.0, -1.0, -4.0]])
    cold = sampler_of(kind, 3).sample(logits, many_rows(4000, 3, min_p=0.1, temperature=0.4))
    hot = sampler_of(kind, 3).sample(logits, many_rows(4000, 3, min_p=0.1, temperature=2.0))
    assert set(cold.tolist()) == {0}
    assert set(hot.tolist()) == {0, 1, 2}


def test_edits_scale_towards_less_likely_then_shift(kind):
    row = Row(edits={0: (2.0, 0.5), 1: (2.0, 0.5)})
    assert edited(np.array([4.0, -4.0, 1.0]), row).tolist() == [2.5, -7.5, 1.0]
    assert one(kind, [4.0, -4.0, 3.0], temperature=0.0, edits={0: (2.0, 0.5)}) == 2
    assert one(kind, [-1.0, -1.5], temperature=0.0, edits={0: (2.0, 0.0)}) == 1


# ---- log-probabilities ----


@pytest.mark.parametrize("vocab_size, top", [(3, 3), (40, 0), (300, 5), (5000, 20)])
def test_logprobs_are_the_log_softmax_of_the_raw_row(kind, vocab_size, top):
    random = np.random.default_rng(vocab_size)
    logits = torch.from_numpy((random.normal(size=(5, vocab_size)) * 3).astype(np.float32))
    index, ids = np.array([4, 0, 2, 2], np.int32), random.integers(0, vocab_size, 4).astype(np.int32)
    ids[0] = logits[4].argmax()
    got = sampler_of(kind, vocab_size).logprobs(logits, index, ids, top)
    expected = torch.log_softmax(logits.double(), dim=1)[index].numpy()
    np.testing.assert_allclose(got.logprobs, expected[np.arange(4), ids], atol=2e-6)
    order = np.argsort(-expected, axis=1, kind="stable")
    assert got.top_ids.tolist() == order[:, :top].tolist()
    np.testing.assert_allclose(got.top_logprobs, np.take_along_axis(expected, order[:, :top], 1), atol=2e-6)
    assert got.ranks.tolist() == [int(np.flatnonzero(order[i] == ids[i])[0]) + 1 for i in range(4)]
    kinds = [got.logprobs.dtype, got.ranks.dtype, got.top_ids.dtype, got.top_logprobs.dtype]
    assert kinds == [np.float32, np.int32, np.int32, np.float32]


def test_equal_logits_rank_by_ascending_id(kind):
    logits = torch.zeros(1, 600)
    logits[0, 500] = 1.0
    got = sampler_of(kind, 600).logprobs(logits, np.zeros(3, np.int32), np.array([500, 0, 400], np.int32), 4)
    assert got.ranks.tolist() == [1, 2, 402]
    assert got.top_ids[0].tolist() == [500, 0, 1, 2]


def test_logprobs_of_odd_rows_are_numbers(kind):
    logits = torch.tensor([[NAN, 0.0, -INF, 0.0], [-INF] * 4, [0.0, INF, INF, 1.0], [-0.0, 0.0, -0.0, NAN]])
    index, ids = np.arange(4, dtype=np.int32), np.array([0, 1, 2, 1], np.int32)
    got = sampler_of(kind, 4).logprobs(logits, index, ids, 4)
    assert not np.isnan(got.logprobs).any()
    assert not np.isnan(got.top_logprobs).any()
    np.testing.assert_allclose(got.logprobs, [-INF, -INF, -np.log(2), -np.log(3)], rtol=1e-6)
    assert got.top_ids.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [1, 2, 3, 0], [0, 1, 2, 3]]
    assert got.ranks.tolist() == [3, 2, 2, 2]


def test_prompt_logprobs_of_hundreds_of_rows(kind):
    random = np.random.default_rng(8)
    logits = torch.from_numpy(random.normal(size=(300, 700)).astype(np.float32))
    ids = random.integers(0, 700, 300).astype(np.int32)
    got = sampler_of(kind, 700).logprobs(logits, np.arange(300, dtype=np.int32), ids, 1)
    expected = torch.log_softmax(logits.double(), dim=1).numpy()[np.arange(300), ids]
    np.testing.assert_allclose(got.logprobs, expected, atol=2e-6)


def test_no_rows_give_no_logprobs(kind):
    none = np.empty(0, np.int32)
    got = sampler_of(kind, 100).logprobs(torch.zeros(1, 100), none, none, 5)
    assert got.top_ids.shape == (0, 5)
