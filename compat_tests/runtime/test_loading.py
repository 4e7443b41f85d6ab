"""Folders in Hugging Face layout become the very model that transformers would load from them."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.loading import load_model, resolve_dtype
from helix_gateway.runtime.progress import silent

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}
ARCHITECTURES = {
    "Llama": SIZES,
    "Mistral": SIZES | {"sliding_window": 8},
    "Mixtral": SIZES | {"num_local_experts": 4},
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Gemma2": SIZES | {"sliding_window": 8},
    "Gemma3Text": SIZES | {"sliding_window": 8},
    "Phi3": SIZES,
    "GPT2": GPT2,
    "GPTNeoX": SIZES,
    "OPT": OPT,
    "Olmo2": SIZES,
    "Starcoder2": SIZES | {"use_bias": True},
    "Granite": SIZES,
    "Cohere": SIZES,
}
TOKENS = torch.arange(1, 25).reshape(1, -1) * 3


def make_model(name, **changes):
    """A tiny model whose every parameter is random, norms and biases too."""
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**{**ARCHITECTURES[name], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return str(folder)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def edit_weights(folder, edit):
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    save_file(edit(weights), path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_sharded_folder_gives_what_transformers_loads_bit_for_bit(name, tmp_path):
    original = make_model(name)
    folder = save(original, tmp_path, max_shard_size="20kB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = load_model(folder, device=CPU)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(loaded, kind)()), dict(getattr(reference, kind)())
        assert ours.keys() == theirs.keys()
        assert not any(tensor.is_meta for tensor in ours.values())
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert torch.equal(logits(loaded), logits(original))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_tensor_and_untied_ones_two(tied, tmp_path):
    loaded = load_model(save(make_model("Llama", tie_word_embeddings=tied), tmp_path), device=CPU)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_gpt2_as_its_hub_stores_it(tmp_path):
    """Without the head's prefix, and with the masks that early releases saved."""
    original = make_model("GPT2")
    folder = save(original, tmp_path)
    mask = torch.ones(1, 1, 64, 64)
    edit_weights(
        folder,
        lambda weights: {name.removeprefix("transformer."): value for name, value in weights.items()}
        | {"h.0.attn.bias": mask, "h.1.attn.bias": mask.clone()},
    )
    assert torch.equal(logits(load_model(folder, device=CPU)), logits(original))


def test_opt_as_its_hub_stores_it(tmp_path):
    original = make_model("OPT")
    folder = save(original, tmp_path)
    edit_weights(folder, lambda weights: {name.removeprefix("model."): value for name, value in weights.items()})
    assert torch.equal(logits(load_model(folder, device=CPU)), logits(original))


def test_rotary_frequencies_of_early_checkpoints_are_no_surprise(tmp_path):
    original = make_model("Llama")
    folder = save(original, tmp_path)
    edit_weights(folder, lambda weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert torch.equal(logits(load_model(folder, device=CPU)), logits(original))


@pytest.mark.parametrize("stored, auto", [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")])
def test_the_dtype_is_the_files_unless_another_is_asked_for(stored, auto, tmp_path):
    folder = save(make_model("Llama").to(getattr(torch, stored)), tmp_path)
    assert resolve_dtype(folder, "auto") == load_model(folder, device=CPU).dtype == getattr(torch, auto)
    for asked in (torch.float32, torch.bfloat16):
        loaded = load_model(folder, device=CPU, dtype=asked)
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=asked)
        assert loaded.dtype == asked
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(logits(loaded), logits(reference))
    with pytest.raises(ModelLoadError, match="use auto, float32 or bfloat16"):
        resolve_dtype(folder, "int3")


def test_attention_is_the_one_that_was_asked_for(tmp_path):
    folder = save(make_model("Llama"), tmp_path)
    assert load_model(folder, device=CPU, attn_implementation="eager").config._attn_implementation == "eager"


def test_progress_goes_up_to_all_of_the_weights_bytes(tmp_path):
    folder = save(make_model("Llama"), tmp_path)
    told, totals = [], []

    class Display:
        def __init__(self, label, total_bytes):
            totals.append(total_bytes)

        def __enter__(self):
            return told.append

        def __exit__(self, *_):
            pass

    load_model(folder, device=CPU, progress=Display)
    weights = load_file(Path(folder) / "model.safetensors").values()
    assert totals == [sum(value.nbytes for value in weights)]
    assert told == sorted(told)
    assert told[-1] == totals[0]


def test_matrices_that_are_read_later_count_when_they_are_read(tmp_path):
    folder = save(make_model("Llama"), tmp_path)
    told, totals, before = [], [], []

    @contextmanager
    def display(label, total_bytes):
        totals.append(total_bytes)
        yield told.append
        assert told[-1] == total_bytes

    def quantise(model, promises):
        before.append(told[-1])
        for parameter in model.parameters():
            stored = promises.stored(parameter)
            for _ in range(0 if stored is None else 2):  # a second look is no progress
                stored.read(None)
        promises.fulfil(model)

    loaded = load_model(folder, device=CPU, quantise=quantise, progress=display)
    weights = load_file(Path(folder) / "model.safetensors").values()
    assert totals == [sum(value.nbytes for value in weights)]
    assert before == [sum(value.nbytes for value in weights if value.ndim == 1)]
    assert told == sorted(set(told))
    assert len(told) == len(weights)
    assert torch.equal(loaded(TOKENS).logits, load_model(folder, device=CPU)(TOKENS).logits)


def test_nothing_is_printed_where_nobody_watches(tmp_path, capfd):
    folder = save(make_model("Llama"), tmp_path)
    capfd.readouterr()
    load_model(folder, device=CPU)
    assert capfd.readouterr() == ("", "")


def drop(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    "edit, message",
    [
        (drop("model.layers.1.mlp.up_proj.weight"), r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda weights: weights | {"model.layers.0.extra": torch.ones(2)}, r"no use for: model\.layers\.0\.extra"),
        (lambda weights: weights | {"model.norm.weight": torch.ones(7)}, r"wrong shape: model\.norm\.weight"),
        (lambda weights: {}, r"lacks the weights .* and \d+ more"),
    ],
)
def test_weights_that_do_not_fit_are_named(edit, message, tmp_path):
    folder = save(make_model("Llama"), tmp_path)
    edit_weights(folder, edit)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(folder, device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 3_000, -1])
def test_a_file_cut_short_is_refused_before_anything_is_read(kept, tmp_path):
    folder = save(make_model("Llama"), tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is no whole safetensors file"):
        load_model(folder, device=CPU)


def test_a_damaged_header_is_refused(tmp_path):
    folder = save(make_model("Llama"), tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"F3\xff"', 1))
    with pytest.raises(ModelLoadError):
        load_model(folder, device=CPU)
    path.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"F64"', 1))
    with pytest.raises(ModelLoadError, match="cannot take"):
        load_model(folder, device=CPU)


def edit_config(folder, **changes):
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "brand-new"}, "type 'brand-new'"),
        ({"model_type": "t5"}, "type 't5', for which transformers has no causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised \\(gptq\\)"),
        ({"num_attention_heads": "four"}, "configuration"),
        ({"num_attention_heads": 0}, "Cannot load|configuration"),
    ],
)
def test_a_config_that_cannot_be_served_says_why_in_one_line(changes, message, tmp_path):
    folder = save(make_model("Llama"), tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(folder, device=CPU)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(tmp_path):
    folder = save(make_model("Llama"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="pickle"):
        load_model(folder, device=CPU)


def measure(model, dtype, what="--measure", **variables):
    """Load in a new process; return the figures of the benchmark."""
    script = Path(__file__).parents[2] / "benchmarks" / "load_memory.py"
    command = [sys.executable, str(script), what, model, dtype]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **variables})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("dtype, weights_bytes", [("float32", 538_060_032), ("bfloat16", 269_030_016)])
def test_loading_the_default_model_takes_little_more_memory_than_its_weights(smollm2_path, dtype, weights_bytes):
    figures = measure(smollm2_path, dtype)
    assert figures["weights_bytes"] == weights_bytes
    assert figures["peak_ratio"] < 1.3, figures


def test_making_the_default_model_ready_to_serve_takes_little_more_memory_than_its_weights(smollm2_path):
    measure(smollm2_path, "float32", "--measure-runner")  # compiles, where nobody has yet: that takes memory of its own
    figures = measure(smollm2_path, "float32", "--measure-runner")
    assert figures["peak_bytes"] < 1.3 * 538_060_032, figures


PACKED_BYTES = 96_436_224
"""Of the default model's matrices: its file's four-bit blocks in the order of tiles, and its table in eight bits."""
POOL_BYTES, NUMBA_BYTES = 1 << 24, 80_000_000
"""Of the trial's keys and values, and what numba takes by its start, however large the model is."""
WIDEST_BYTES = 49_152 * 576 * 4
"""The table in float32, which a first start holds the quantised one to."""


def test_a_quantised_model_takes_little_more_than_its_packed_weights_and_at_its_first_start_one_matrix(
    smollm2_path, tmp_path
):
    measure(smollm2_path, "auto", "--measure-runner")  # compiles, where nobody has yet
    first, later = (
        measure(smollm2_path, "auto", "--measure-runner", HELIX_CACHE=str(tmp_path))["peak_bytes"] for _ in range(2)
    )
    besides = POOL_BYTES + NUMBA_BYTES
    assert later < 1.3 * PACKED_BYTES + besides, later
    assert first < 1.3 * PACKED_BYTES + WIDEST_BYTES + besides, first


def test_converting_a_folder_takes_little_more_memory_than_its_weights(tmp_path):
    config = transformers.LlamaConfig(
        **{**SIZES, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    figures = measure(save(model, tmp_path, max_shard_size="30MB"), "float32")
    assert figures["weights_bytes"] > 200_000_000
    assert figures["peak_ratio"] < 1.25, figures


def test_loading_asks_no_network(tmp_path, monkeypatch):
    folder = save(make_model("Llama"), tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    load_model(folder, device=CPU)


def test_silent_progress_shows_nothing():
    with silent("label", 10) as report:
        assert report(5) is None
