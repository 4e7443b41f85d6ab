"""A float model in four bits is rounded for the text that it reads, once; what cannot be is rounded without."""

import copy
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from compat_tests.runtime.paged import Feeder, random_sequences
from compat_tests.tiny_models import TINY_MODELS
from helix_gateway.runtime import four_bit_model, remembered
from helix_gateway.runtime.compiled_runner import CompiledRunner
from helix_gateway.runtime.cpu import calibrating
from helix_gateway.runtime.cpu.error_feedback import as_blocks, moments_of, round_with_feedback
from helix_gateway.runtime.cpu.quantised_weights import Int4Weight, Int8Weight
from helix_gateway.runtime.factory import load_runner
from helix_gateway.runtime.loading import open_checkpoint
from helix_gateway.runtime.own_text import own_text
from helix_gateway.runtime.weight_room import NoRoomError
from helix_gateway.text.sample_text import sample_text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and a short text."""
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(four_bit_model, "_SEQUENCES", 4)
    monkeypatch.setattr(four_bit_model, "_LENGTH", 64)
    return tmp_path / "cache" / "rounded"


@pytest.fixture
def folder(tmp_path):
    return saved("llama", tmp_path / "model")


def saved(family, folder):
    TINY_MODELS[family](0)[1].save_pretrained(folder)
    return str(folder)


def load(path, quantization="int4", **options):
    return load_runner(path, device="cpu", quantization=quantization, max_tokens_in_use=1000, **options).runner


def answers(runner):
    return torch.cat(Feeder(runner, random_sequences((30, 7), vocab_size=runner.vocab_size)).run(11, 2))


def loaded(path, **options):
    """A runner, and what was logged that somebody should know."""
    with capture_logs() as logs:
        runner = load(path, **options)
    return runner, [line for line in logs if line["log_level"] == "warning"]


# ---- rounding


def correlated(tokens, inputs, seed):
    """Inputs of which some are much larger than others, and all go along with one another."""
    dice = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, inputs, generator=dice) @ torch.randn(inputs, inputs, generator=dice)
    return mixed * torch.rand(inputs, generator=dice).exp() ** 2


def lost(values, weights, inputs):
    return float(((values - weights) @ inputs.T).double().square().sum())


@pytest.mark.parametrize("channels, inputs, seed", [(96, 160, 1), (7, 32, 2), (65, 320, 3), (128, 64, 4)])
def test_answers_are_nearer_than_those_of_weights_that_are_each_rounded_well(channels, inputs, seed):
    weights = torch.randn(channels, inputs, generator=torch.Generator().manual_seed(seed))
    seen = correlated(3000, inputs, seed)
    rounded = torch.from_numpy(round_with_feedback(2, weights, moments_of(seen)).values())
    assert lost(rounded, weights, seen) < 0.7 * lost(Int4Weight.from_float(weights).unpacked(), weights, seen)


def test_going_through_the_groups_again_never_loses(monkeypatch):
    weights, seen = torch.randn(70, 160, generator=torch.Generator().manual_seed(5)), correlated(500, 160, 5)
    moments = moments_of(seen)
    errors = []
    for passes in range(4):
        monkeypatch.setattr("helix_gateway.runtime.cpu.error_feedback._PASSES", passes)
        off = torch.from_numpy(round_with_feedback(2, weights, moments).values()) - weights
        errors.append(((off @ moments.second) * off).double().sum(1))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()  # of every channel
    assert errors[-1].sum() < 0.97 * errors[0].sum()


def test_moments_are_those_of_the_inputs_and_their_feedback_inverts_them():
    seen = correlated(600, 320, 6)
    second, feedback = moments_of(seen)
    plain = seen.T @ seen / len(seen)
    assert torch.allclose(second - torch.diag(second.diagonal() - plain.diagonal()), plain, rtol=1e-4, atol=1e-3)
    assert torch.allclose(feedback.double().T @ feedback.double() @ second.double(), torch.eye(320).double(), atol=1e-3)
    assert not feedback.tril(-1).any()


def test_a_matrix_is_rounded_alike_on_any_number_of_threads_and_in_blocks():
    weights, seen = torch.randn(200, 96, generator=torch.Generator().manual_seed(7)), correlated(300, 96, 7)
    found = [round_with_feedback(threads, weights, moments_of(seen)) for threads in (1, 2, 2)]
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert torch.equal(Int4Weight.from_blocks(as_blocks(found[0])).unpacked(), torch.from_numpy(found[0].values()))


@pytest.mark.parametrize("weights", [torch.zeros(32, 64), torch.full((32, 64), -0.75)])
def test_a_matrix_of_one_number_stays_that_number(weights):
    assert torch.equal(
        torch.from_numpy(round_with_feedback(2, weights, moments_of(torch.ones(4, 64))).values()), weights
    )


def test_inputs_that_are_all_zero_leave_weights_to_be_rounded_each_by_itself():
    weights = torch.randn(32, 64, generator=torch.Generator().manual_seed(8))
    rounded = torch.from_numpy(round_with_feedback(2, weights, moments_of(torch.zeros(4, 64))).values())
    plain = Int4Weight.from_float(weights).unpacked()
    assert (rounded - weights).square().sum() < 1.02 * (plain - weights).square().sum()


# ---- a model


def test_the_second_start_rounds_nothing_and_answers_bit_by_bit_what_the_first_did(folder, cache, monkeypatch):
    first, warned = loaded(folder)
    assert not warned
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(four_bit_model, "own_text", None)
    second, warned = loaded(folder)
    assert not warned
    assert type(second) is CompiledRunner
    assert torch.equal(answers(first), answers(second))


def test_a_model_is_rounded_alike_each_time(folder, tmp_path, monkeypatch):
    first = answers(load(folder))
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "another"))
    assert torch.equal(first, answers(load(folder)))


def test_a_rounded_model_is_nearer_to_what_it_was_made_of_than_one_rounded_without_its_inputs(folder, monkeypatch):
    exact = answers(load(folder, "none"))
    rounded = answers(load(folder))
    monkeypatch.setattr(four_bit_model, "_MOST_SQUARES", 0)
    monkeypatch.setattr(four_bit_model, "_VERSION", 0)
    without, warned = loaded(folder)
    assert [line["event"] for line in warned] == ["rounded_without_calibration"]
    assert (rounded - exact).norm() < 0.9 * (answers(without) - exact).norm()


def test_the_text_that_is_given_is_read_too(folder):
    asked = []

    def sample_ids(path):
        asked.append(path)
        return list(range(3, 250)) * 2

    given = answers(load(folder, sample_ids=sample_ids))
    assert asked == [folder]
    assert not torch.equal(given, answers(load(folder)))
    assert torch.equal(given, answers(load(folder, sample_ids=sample_ids)))
    assert asked == [folder]


def test_too_short_a_text_is_done_without(folder):
    assert torch.equal(answers(load(folder, sample_ids=lambda _: [5])), answers(load(folder)))


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file at all"])
def test_kept_blocks_that_are_damaged_are_made_again(damage, folder, cache):
    first = answers(load(folder))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    again, warned = loaded(folder)
    assert [line["event"] for line in warned] == ["kept_blocks_ignored"]
    assert torch.equal(first, answers(again))
    assert file.read_bytes() == whole


def test_one_bit_of_kept_blocks_that_is_another_is_noticed(folder, cache):
    first = answers(load(folder))
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again, warned = loaded(folder)
    assert [line["event"] for line in warned] == ["kept_blocks_ignored"]
    assert torch.equal(first, answers(again))


def test_kept_blocks_that_have_gone_are_made_again_without_a_word(folder, cache):
    first = answers(load(folder))
    for file in cache.iterdir():
        file.unlink()
    again, warned = loaded(folder)
    assert not warned
    assert torch.equal(first, answers(again))


def test_other_weights_in_the_same_folder_are_rounded_anew(folder, cache):
    first = answers(load(folder))
    TINY_MODELS["llama"](1)[1].save_pretrained(folder)
    assert not torch.equal(first, answers(load(folder)))
    assert len(list(cache.iterdir())) == 2


def test_a_cache_folder_that_cannot_be_written_is_no_fault(folder, cache, tmp_path, monkeypatch):
    first = answers(load(folder))
    other = tmp_path / "other"
    other.mkdir()
    (other / cache.name).write_text("in the way")
    monkeypatch.setenv("HELIX_CACHE", str(other))
    again, warned = loaded(folder)
    assert not warned
    assert torch.equal(first, answers(again))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_rounding_that_is_broken_off_leaves_nothing(error, folder, cache, monkeypatch):
    calls = iter(range(3))

    def break_off(*arguments):
        if next(calls, None) is None:
            raise error("broken off")
        return round_with_feedback(*arguments)

    monkeypatch.setattr(calibrating, "round_with_feedback", break_off)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            load(folder)
    else:
        _, warned = loaded(folder)
        assert [line["event"] for line in warned] == ["rounded_without_calibration"]
    assert not cache.exists()
    monkeypatch.undo()
    monkeypatch.setenv("HELIX_CACHE", str(cache.parent))
    monkeypatch.setattr(four_bit_model, "_LENGTH", 64)
    _, warned = loaded(folder)
    assert not warned
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_model_without_a_compiled_step_is_rounded_without_its_inputs_and_says_so(family, cache, tmp_path):
    path = saved(family, tmp_path / "model")
    for _ in range(2):
        runner, warned = loaded(path)
        assert [line["reason"] for line in warned] == ["there is no compiled step of it"]
        assert any(isinstance(getattr(module, "weight_tiles", None), Int4Weight) for module in runner.model.modules())
    assert not cache.exists()


def test_where_memory_is_short_it_is_rounded_without_inputs_this_time_only(folder, cache, monkeypatch):
    with monkeypatch.context() as short:
        short.setattr(four_bit_model, "free_memory_bytes", lambda _: 1000)
        _, warned = loaded(folder)
    assert [line["event"] for line in warned] == ["rounded_without_calibration"]
    assert "are free" in warned[0]["reason"]
    _, warned = loaded(folder)
    assert not warned
    assert cache.exists()


def test_memory_is_counted_for_the_moments_of_the_widest_layers_inputs(folder, monkeypatch):
    shapes = [tensor.shape for tensor in open_checkpoint(folder).tensors(tuple).values() if len(tensor.shape) == 2]
    numbers, width = sum(rows * columns for rows, columns in shapes), max(columns for _, columns in shapes)
    needed = numbers * 5 // 4 + 24 * 4 * 64 * width + 40 * width**2
    monkeypatch.setattr(four_bit_model, "free_memory_bytes", lambda _: needed - 1)
    with pytest.raises(MemoryError):
        four_bit_model._check_size(folder)
    monkeypatch.setattr(four_bit_model, "free_memory_bytes", lambda _: needed)
    four_bit_model._check_size(folder)


@pytest.mark.parametrize("change", ["code_digest", "_processor_name"])
def test_what_was_refused_is_tried_again_by_other_code_or_on_another_machine(change, cache, tmp_path, monkeypatch):
    path, written = saved("llama", tmp_path / "model"), []
    right = four_bit_model._text

    def text(runner, given):
        written.append(runner)
        return right(runner, given)

    monkeypatch.setattr(four_bit_model, "_text", text)
    with monkeypatch.context() as before:
        before.setattr(four_bit_model, "own_text", refuse)
        for _ in range(2):
            assert [line["reason"] for line in loaded(path)[1]] == ["not yet"]
    assert len(written) == 1  # the second start knew
    assert [line["reason"] for line in loaded(path)[1]] == ["not yet"]
    monkeypatch.setattr(remembered, change, lambda *_: "another")
    assert not loaded(path)[1]
    assert cache.exists()


def refuse(*_):
    raise calibrating.NotCalibratedError("not yet")


def test_where_eight_bits_do_not_fit_that_is_the_reason_and_no_option_is_advised(folder, cache):
    def no_room(_):
        raise NoRoomError("The weights take 2 GiB, and 1 GiB of memory are free: use --quantization int4.")

    with capture_logs() as warned:
        assert four_bit_model.four_bits_of(folder, no_room, None) is None
    (line,) = warned
    assert (line["event"], "--quantization" in line["reason"]) == ("rounded_without_calibration", False)
    assert "eight bits" in line["reason"]


def test_starts_that_are_killed_while_they_round_are_not_repeated_for_ever(folder, monkeypatch):
    ask = f"""
import os
from helix_gateway.runtime import four_bit_model
from helix_gateway.runtime.four_bit_model import four_bits_of
four_bit_model._check_size = lambda path: os._exit(9)
four_bits_of({folder!r}, None, None)
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", ask], timeout=120).returncode == 9
    for _ in range(2):
        _, warned = loaded(folder)
        assert [line["event"] for line in warned] == ["rounded_without_calibration"]
        assert "2 starts were killed" in warned[0]["reason"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "granite"])
def test_each_family_with_a_compiled_step_is_rounded_for_its_inputs(family, cache, tmp_path):
    runner, warned = loaded(saved(family, tmp_path / "model"))
    assert not [line for line in warned if line["event"] == "rounded_without_calibration"]
    assert len(list(cache.iterdir())) == 1
    layer = runner.model.base_model.layers[-1]
    attention = layer.self_attn
    projection = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.v_proj
    assert [type(part.weight_tiles) for part in (layer.mlp.down_proj, attention.o_proj)] == [Int4Weight] * 2
    assert type(projection.weight_tiles) is Int8Weight


def test_a_model_writes_the_same_text_again(folder):
    runner = load(folder, "int8")
    first = own_text(runner, 3, 20)
    assert first.shape == (3, 20)
    assert first.min() >= 0
    assert first.max() < runner.vocab_size
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert np.array_equal(first, own_text(copy.copy(runner), 3, 20))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_pool_that_holds_few_sequences_has_the_same_text_written_within_it(family, tmp_path, monkeypatch):
    runner = load(saved(family, tmp_path / "model"), "int8")
    whole, pages = own_text(runner, 5, 40), []
    each = sum(-(-40 // group.tokens_per_block) for group in runner.kv_groups)
    right = type(runner).forward

    def forward(self, batch):
        pages.extend(int(table.max()) for table in batch.block_tables)
        return right(self, batch)

    monkeypatch.setattr(type(runner), "forward", forward)
    monkeypatch.setattr(type(runner), "num_pages", 2 * each + 1)
    assert np.array_equal(whole, own_text(runner, 5, 40))
    assert max(pages) < 2 * each + 1


def test_a_pool_that_holds_no_sequence_is_too_little_memory(folder, monkeypatch):
    runner = load(folder, "int8")
    monkeypatch.setattr(type(runner), "num_pages", 2)
    with pytest.raises(MemoryError, match="2 pages"):
        own_text(runner, 5, 40)


def test_python_brings_text_along():
    text = sample_text()
    assert 20_000 < len(text) < 90_000
    assert text == sample_text()
