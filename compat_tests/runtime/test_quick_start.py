"""A later start reads what the first has written down of a model, without transformers; what differs has it made anew."""

import json

import pytest
import torch
from structlog.testing import capture_logs
from test_loading_gguf import CASES, write_gguf
from test_loading_gguf import make_model as make_gguf_model

from compat_tests.runtime.paged import Feeder, random_sequences, turn_wrongly_from
from compat_tests.tiny_models import LLAMA_LIKE_OPTIONS, TINY_MODELS, make_model
from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime import describing, factory
from helix_gateway.runtime.compiled_runner import CompiledRunner
from helix_gateway.runtime.cpu.llama import LlamaStep
from helix_gateway.runtime.cpu.quantised_llama import QuantisedLlamaStep
from helix_gateway.runtime.factory import load_runner, load_runners
from helix_gateway.runtime.remembered import Remembered
from helix_gateway.runtime.rotary import RotaryTable, frequencies_of
from helix_gateway.runtime.runner import TransformersRunner

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "granite")
PLAIN_FAMILIES = ("llama", "qwen2")
"""Those that have a compiled step in float."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own; compiled code stays where it is."""
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remembered"


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    return saved(TINY_MODELS["llama"](0)[1], tmp_path / "model")


def load(path, **options):
    return load_runner(path, device="cpu", **{"max_tokens_in_use": 1000, **options}).runner


def answers(runner):
    return torch.cat(Feeder(runner, random_sequences((30, 7), vocab_size=runner.vocab_size)).run(11, 2))


def assert_starts_quickly_and_alike(path, **options):
    first = load(path, **options)
    with capture_logs() as logs:
        second = load(path, **options)
    assert type(first) is TransformersRunner
    assert type(second) is CompiledRunner
    assert not [line for line in logs if line["log_level"] == "warning"]
    assert torch.equal(answers(first), answers(second))
    for told in ("context_length", "vocab_size", "num_pages", "page_bytes", "kv_groups"):
        assert getattr(first, told) == getattr(second, told)
    return first, second


def assert_goes_the_full_way(path, **options):
    with capture_logs() as logs:
        assert type(load(path, **options)) is TransformersRunner
    return [line["event"] for line in logs]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_start_of_a_quantised_model_answers_bit_by_bit_what_the_first_did(family, quantization, tmp_path):
    path = saved(TINY_MODELS[family](0)[1], tmp_path / "model")
    assert_starts_quickly_and_alike(path, quantization=quantization)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_so_does_that_of_a_model_in_float(family, dtype, tmp_path):
    path = saved(TINY_MODELS[family](0)[1].to(getattr(torch, dtype)), tmp_path / "model")
    first, _ = assert_starts_quickly_and_alike(path, dtype=dtype)
    assert isinstance(first._compute, LlamaStep)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ],
    ids=["tied", "biases", "linear rope"],
)
def test_whatever_a_llama_may_have_is_read_again(options, dtype, tmp_path):
    _, model = make_model("llama", {**LLAMA_LIKE_OPTIONS, **options}, 5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    assert_starts_quickly_and_alike(saved(model, tmp_path / "model"), dtype=dtype)


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_of_every_family_starts_quickly_too(case, tmp_path):
    arch, name, changes = CASES[case]
    path = write_gguf(tmp_path / "model.gguf", arch, make_gguf_model(name, **changes))
    assert_starts_quickly_and_alike(path)


def test_two_models_over_one_pool_start_quickly_together(folder, tmp_path):
    paths = [folder, saved(TINY_MODELS["qwen2"](1)[1], tmp_path / "draft")]
    first, second = ([each.runner for each in load_runners(paths, device="cpu", max_tokens_in_use=99)] for _ in "ab")
    assert {type(runner) for runner in first} == {TransformersRunner}
    assert {type(runner) for runner in second} == {CompiledRunner}
    for before, after in zip(first, second, strict=True):
        assert torch.equal(answers(before), answers(after))


def test_a_model_that_is_served_through_its_modules_is_so_again(tmp_path):
    path = saved(TINY_MODELS["gpt2"](0)[1], tmp_path / "model")
    load(path)
    assert assert_goes_the_full_way(path) == ["no_compiled_step"]


def change(cache, alter):
    """Write another description, as if it had been found."""
    for file in cache.iterdir():
        content = json.loads(file.read_text())
        known = Remembered(content["circumstances"], cache)
        description = content["found"]["description"]
        alter(description)
        known.put("description", description)


def without_bits(description):
    description["frequencies"][""]["inverse"][1] *= 1.0001


@pytest.mark.parametrize(
    "alter",
    [
        lambda told: told["structure"].update(scaling=0.3),
        lambda told: told["layers"].reverse(),
        lambda told: told["layers"][0]["products"][0].reverse(),
        lambda told: told["layers"][1]["norms"][0].update(name="model.layers.0.no_norm"),
        lambda told: told["layers"][1]["norms"][0].update(adds_one=True),
        lambda told: told.update(embedding="lm_head"),
        lambda told: told["form"].update(quantisation="int4"),
        lambda told: told.pop("layers"),
        lambda told: told.update(context_length="long"),
        without_bits,
    ],
)
def test_a_description_that_is_not_the_models_is_refused_with_a_line_and_made_anew(alter, folder, cache):
    load(folder)
    change(cache, alter)
    assert "quick_start_failed" in assert_goes_the_full_way(folder)
    assert type(load(folder)) is CompiledRunner


def test_a_description_that_fails_and_cannot_be_made_anew_fails_once(folder, cache, monkeypatch):
    load(folder)
    change(cache, lambda told: told["layers"].reverse())
    monkeypatch.setattr(describing, "describe", lambda *_: None)
    assert "quick_start_failed" in assert_goes_the_full_way(folder)
    assert assert_goes_the_full_way(folder) == []


def test_what_cannot_be_written_down_costs_a_line_and_no_start(folder, monkeypatch):
    def fail(*_):
        raise KeyError("model.norm")

    monkeypatch.setattr(describing, "describe", fail)
    assert assert_goes_the_full_way(folder) == ["not_written_down"]


def test_what_was_not_written_down_is_checked_without_a_line(folder, cache):
    load(folder)
    for file in cache.iterdir():
        file.unlink()
    assert assert_goes_the_full_way(folder) == []


def test_transformers_sources_that_were_edited_in_place_have_it_made_anew(folder, monkeypatch):
    load(folder)
    assert type(load(folder)) is CompiledRunner
    identities = factory.file_identities
    monkeypatch.setattr(factory, "file_identities", lambda path: ["other"] if "modeling" in path else identities(path))
    assert assert_goes_the_full_way(folder) == []
    assert type(load(folder)) is CompiledRunner


@pytest.mark.parametrize("dtype, step", [("auto", QuantisedLlamaStep), ("float32", LlamaStep)])
def test_a_step_that_computes_otherwise_than_it_did_is_not_trusted(dtype, step, folder, monkeypatch):
    load(folder, dtype=dtype)
    turn_wrongly_from(0, step, monkeypatch)
    assert assert_goes_the_full_way(folder, dtype=dtype)[0] == "quick_start_failed"
    monkeypatch.undo()


def test_memory_that_does_not_suffice_is_said_as_at_the_first_start(folder):
    load(folder)
    with pytest.raises(ModelLoadError, match=r"KV cache does not fit.*--kv-cache-memory"), capture_logs() as logs:
        load(folder, kv_cache_memory_bytes=100)
    assert not logs


def test_frequencies_are_those_of_the_embedding_to_the_last_bit_or_none():
    _, model = TINY_MODELS["gemma3"](0)
    table = RotaryTable(model.model.rotary_emb, 300)
    kinds = {"sliding_attention", "full_attention"}
    assert frequencies_of(table, kinds).keys() == kinds
    right = table.embedding.forward
    table.embedding.forward = lambda x, positions, kind: tuple(
        torch.where(positions[..., None] == 299, values.nextafter(torch.tensor(2.0)), values)
        for values in right(x, positions, kind)
    )
    assert frequencies_of(table, kinds) is None
