"""From a folder to a runner: what is loaded is the model, and memory is asked for with measure."""

import copy

import pytest
import torch
import transformers
from structlog.testing import capture_logs

from compat_tests.runtime.paged import Feeder, random_sequences
from compat_tests.tiny_models import TINY_MODELS
from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime import factory
from helix_gateway.runtime.cpu.quantised_weights import Int4Weight, Int8ChannelWeight
from helix_gateway.runtime.cpu.quantising import is_quantised
from helix_gateway.runtime.factory import load_runner, resolve_quantisation
from helix_gateway.runtime.torch_attention import TorchPagedAttention


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    _, model = TINY_MODELS["qwen3"](0)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return model, str(path)


def test_a_loaded_folder_gives_the_models_own_logits(folder):
    model, path = folder
    loaded = load_runner(path, device="cpu", dtype="float32", max_tokens_in_use=1000)
    (tokens,) = random_sequences((30,))
    (logits,) = Feeder(loaded.runner, [tokens]).run(11, 1)
    with torch.inference_mode():
        wanted = model(torch.tensor(tokens[None], dtype=torch.long)).logits[0]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=2e-5)
    assert (loaded.context_length, loaded.step_tokens) == (512, 256)
    assert torch.get_num_threads() == 1


def test_no_more_memory_is_taken_than_the_tokens_need(folder):
    _, path = folder
    assert load_runner(path, device="cpu", max_tokens_in_use=1000).runner.num_pages == 63
    asked = load_runner(path, device="cpu", kv_cache_memory_bytes=1 << 22, max_tokens_in_use=1000).runner
    assert asked.num_pages == (1 << 22) // asked.page_bytes


def test_half_of_what_is_free_is_the_most(folder, monkeypatch):
    _, path = folder
    monkeypatch.setattr(factory, "free_memory_bytes", lambda device: 1 << 21)
    runner = load_runner(path, device="cpu", max_tokens_in_use=1 << 30).runner
    assert runner.num_pages == (1 << 20) // runner.page_bytes


def test_memory_for_not_one_page_is_said_in_one_line(folder):
    _, path = folder
    with pytest.raises(ModelLoadError, match=r"KV cache does not fit.*MiB.*--kv-cache-memory") as refusal:
        load_runner(path, device="cpu", kv_cache_memory_bytes=100, max_tokens_in_use=1000)
    assert "\n" not in str(refusal.value)


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    """Each test's start is a model's first, through transformers."""
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))


# ---- what weights, keys and values are stored in

FLOAT32, BFLOAT16, INT8 = torch.float32, torch.bfloat16, torch.int8


def formats(runner):
    """What a layer's product has become, and what keys and values are stored in."""
    product = next(module for name, module in runner._model.named_modules() if name.endswith("mlp.down_proj"))
    weight = product.weight_tiles
    kind = type(weight) if is_quantised(runner._model) else weight.dtype
    return kind, runner._pages.arena.layout.dtype


@pytest.mark.parametrize(
    "dtype, quantization, kv_cache_dtype, weights, stored",
    [
        ("auto", "auto", "auto", Int8ChannelWeight, INT8),
        ("auto", "auto", "float32", Int8ChannelWeight, FLOAT32),
        ("auto", "auto", "bfloat16", Int8ChannelWeight, BFLOAT16),
        ("auto", "int8", "auto", Int8ChannelWeight, INT8),
        ("auto", "int4", "auto", Int4Weight, INT8),
        ("auto", "none", "auto", FLOAT32, FLOAT32),
        ("auto", "none", "int8", FLOAT32, INT8),
        ("float32", "auto", "auto", FLOAT32, FLOAT32),
        ("float32", "none", "auto", FLOAT32, FLOAT32),
        ("float32", "auto", "int8", FLOAT32, INT8),
        ("float32", "int8", "auto", Int8ChannelWeight, FLOAT32),
        ("float32", "int4", "int8", Int4Weight, INT8),
        ("bfloat16", "auto", "auto", BFLOAT16, BFLOAT16),
        ("bfloat16", "none", "float32", BFLOAT16, FLOAT32),
        ("bfloat16", "auto", "int8", BFLOAT16, INT8),
    ],
)
def test_what_is_asked_for_decides_before_what_is_fastest(dtype, quantization, kv_cache_dtype, weights, stored, folder):
    options = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    runner = load_runner(
        folder[1], device="cpu", kv_cache_memory_bytes=1 << 20, max_tokens_in_use=100, **options
    ).runner
    assert formats(runner) == (weights, stored)


def test_left_out_they_are_auto(folder):
    assert formats(load_runner(folder[1], device="cpu", max_tokens_in_use=100).runner) == (Int8ChannelWeight, INT8)


@pytest.mark.parametrize(
    "quantization, expected", [("auto", (Int8ChannelWeight, INT8)), ("none", (BFLOAT16, BFLOAT16))]
)
def test_a_file_in_bfloat16_is_quantised_too_unless_it_is_not_wanted(quantization, expected, folder, tmp_path):
    copy.deepcopy(folder[0]).bfloat16().save_pretrained(tmp_path)
    runner = load_runner(str(tmp_path), device="cpu", quantization=quantization, max_tokens_in_use=100).runner
    assert formats(runner) == expected


def test_a_block_size_that_int8_cannot_have_is_rounded_up(folder):
    runner = load_runner(folder[1], device="cpu", block_size=3, max_tokens_in_use=100).runner
    assert [group.tokens_per_block for group in runner.kv_groups] == [4]


def test_elsewhere_than_on_a_processor_nothing_is_quantised_unless_it_is_asked_for(folder, monkeypatch):
    # Here no other device can be had: the torch path on this one, told that it is another's.
    monkeypatch.setattr(
        factory, "resolve_quantisation", lambda _, *asked: resolve_quantisation(torch.device("mps"), *asked)
    )
    monkeypatch.setattr("helix_gateway.runtime.pool.device_attention", lambda device, dtype: TorchPagedAttention)
    runner = load_runner(folder[1], device="cpu", max_tokens_in_use=100).runner
    assert formats(runner) == (FLOAT32, FLOAT32)
    with pytest.raises(ModelLoadError, match="--quantization int8 is for CPUs"):
        load_runner(folder[1], device="cpu", quantization="int8", max_tokens_in_use=100)


def mixture_of_experts():
    config = transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    return transformers.MixtralForCausalLM(config)


def test_what_cannot_be_quantised_is_served_as_it_is_with_one_line_unless_it_must_be(tmp_path):
    mixture_of_experts().save_pretrained(tmp_path)
    with capture_logs() as lines:
        runner = load_runner(str(tmp_path), device="cpu", max_tokens_in_use=100).runner
    assert not is_quantised(runner._model)
    assert runner._pages.arena.layout.dtype == FLOAT32
    (line,) = [line for line in lines if line["log_level"] == "warning"]
    assert line["event"] == "not_quantised"
    assert "rearranges its weights" in line["reason"]
    with pytest.raises(ModelLoadError, match=r"MixtralForCausalLM cannot be quantised.*--quantization none"):
        load_runner(str(tmp_path), device="cpu", quantization="int8", max_tokens_in_use=100)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_structures_without_a_compiled_step_are_quantised_and_say_once_that_they_have_none(name, tmp_path):
    _, model = TINY_MODELS[name](0)
    model.save_pretrained(tmp_path)
    with capture_logs() as lines:
        runner = load_runner(str(tmp_path), device="cpu", max_tokens_in_use=100).runner
    assert is_quantised(runner._model)
    assert [line["event"] for line in lines] == ["no_compiled_step"]
    assert lines[0]["reason"] == "its layers are not those of a family that has one"
