"""GGUF files become the model that they were made from: each family, written here as llama.cpp's converter does."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.checkpoints.gguf_file import GGUFFile, TensorInfo
from helix_gateway.runtime.checkpoints.gguf_tensors import read_tensor
from helix_gateway.runtime.cpu.quantised_weights import Int4Weight, Int8Weight
from helix_gateway.runtime.factory import load_runner
from helix_gateway.runtime.loading import load_model, model_config, resolve_dtype

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TOKENS = (torch.arange(40).reshape(1, -1) * 7) % 96
ROTARY = {"rope_type": "default", "rope_theta": 5_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 5_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 5_000.0,
    "long_factor": [1.0 + index for index in range(8)],
    "short_factor": [1.0 + index / 4 for index in range(8)],
    "original_max_position_embeddings": 32,
}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}
GEMMA3_ROTARY = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
CASES = {
    "llama": ("llama", "Llama", {"rope_parameters": ROTARY}),
    "llama, tied": ("llama", "Llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", "Llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", "Llama", {"rope_parameters": ROTARY | {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("llama", "Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", "Qwen2", {"rope_parameters": ROTARY}),
    "qwen2, yarn": ("qwen2", "Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", "Gemma2", GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}),
    "gemma3": ("gemma3", "Gemma3Text", GEMMA | {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROTARY}),
    "phi3": ("phi3", "Phi3", {"sliding_window": 8}),
    "phi3, partial": ("phi3", "Phi3", {"rope_parameters": ROTARY | {"partial_rotary_factor": 0.5}}),
    "phi3, long": ("phi3", "Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
}


def make_model(name, **changes):
    """A tiny model whose every parameter is random, norms and biases too."""
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model


def interleave(rows, num_heads):
    """llama.cpp rotates neighbouring rows of a head, where the two halves of a head were rotated together."""
    heads = rows.reshape(num_heads, -1, *rows.shape[1:])
    half = heads.shape[1] // 2
    order = [index + shift for index in range(half) for shift in (0, half)]
    return heads[:, order].reshape(rows.shape)


def converted(arch, config, name, values):
    if arch == "llama" and ".q_proj." in name:
        return interleave(values, config.num_attention_heads)
    if arch == "llama" and ".k_proj." in name:
        return interleave(values, config.num_key_value_heads)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    return values


def llama3_divisors(rope, dim):
    """What Llama 3.1 divides each frequency by, as its paper's code computes it, one frequency at a time."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    divisors = []
    for index in range(0, dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (index / dim)
        mix = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        middle = 1 / ((1 - mix) / rope["factor"] + mix)
        divisors.append(1.0 if wavelength < high else rope["factor"] if wavelength > low else middle)
    return np.array(divisors, np.float32)


def write_rotary(writer, config):
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, config.head_dim))
    if kind == "longrope":
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))


def write_metadata(writer, arch, config):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if arch != "phi3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    else:
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * config.head_dim))
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if arch in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def write_gguf(path, arch, model, *, kind=Kind.F32, extra=lambda writer: None, leave_out=()):
    """Write a model under llama.cpp's conventions; matrices in the given type, all else in float32."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), arch)
    write_metadata(writer, arch, config)
    write_rotary(writer, config)
    extra(writer)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, values in model.state_dict().items():
        stored_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored_name in leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array = np.ascontiguousarray(converted(arch, config, name, values.float().numpy()))
        tensor_kind = kind if array.ndim > 1 else Kind.F32
        writer.add_tensor(stored_name, gguf.quants.quantize(array, tensor_kind), raw_dtype=tensor_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("case", CASES)
def test_a_family_computes_what_its_original_computes(case, tmp_path):
    arch, name, changes = CASES[case]
    original = make_model(name, **changes)
    loaded = load_model(write_gguf(tmp_path / "model.gguf", arch, original), device=CPU)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert loaded.dtype == torch.float32
    expected = logits(original)
    assert expected.std() > 0.1
    difference = (logits(loaded) - expected).abs().max()
    # Adding 1 to Gemma's norms and taking it away again rounds them.
    assert difference <= (1e-5 if arch.startswith("gemma") else 0.0), difference
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == original.config.tie_word_embeddings


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_is_the_originals(case, tmp_path):
    arch, name, changes = CASES[case]
    original = make_model(name, **changes).config
    loaded = model_config(write_gguf(tmp_path / "model.gguf", arch, make_model(name, **changes)))
    for key in (
        "max_position_embeddings",
        "sliding_window",
        "layer_types",
        "rope_parameters",
        "head_dim",
        "vocab_size",
    ):
        theirs, ours = getattr(original, key, None), getattr(loaded, key, None)
        if key == "sliding_window" and name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
            continue
        assert approximately(ours) == approximately(theirs), key


def approximately(value):
    """Numbers rounded as float32 rounds them, however deep they lie."""
    if isinstance(value, dict):
        return {key: approximately(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [approximately(inner) for inner in value]
    return float(np.float32(value)) if isinstance(value, float) else value


@pytest.mark.parametrize("kind, steps", [(Kind.Q8_0, 127), (Kind.Q4_0, 8), (Kind.F16, 2**11), (Kind.BF16, 2**8)])
def test_quantised_weights_are_within_their_rounding(kind, steps, tmp_path):
    original = make_model("Llama")
    path = write_gguf(tmp_path / "model.gguf", "llama", original, kind=kind)
    loaded = load_model(path, device=CPU, dtype=torch.float32)
    for name, values in original.named_parameters():
        error = (loaded.get_parameter(name) - values).abs().max()
        bound = values.abs().max() / steps * 1.01
        assert error <= (bound if values.ndim > 1 else 0.0), name
    assert torch.nn.functional.cosine_similarity(logits(loaded), logits(original), dim=-1).min() > 0.9


@pytest.mark.parametrize(
    "kind, auto", [(Kind.F32, "float32"), (Kind.F16, "float32"), (Kind.Q8_0, "float32"), (Kind.BF16, "bfloat16")]
)
def test_the_dtype_is_float32_unless_the_file_is_bfloat16(kind, auto, tmp_path):
    original = make_model("Llama")
    path = write_gguf(tmp_path / "model.gguf", "llama", original, kind=kind)
    assert resolve_dtype(path, "auto") == load_model(path, device=CPU).dtype == getattr(torch, auto)
    assert resolve_dtype(path, "bfloat16") == torch.bfloat16
    rounded = load_model(path, device=CPU, dtype=torch.bfloat16)
    exact = load_model(path, device=CPU, dtype=torch.float32)
    assert all(torch.equal(value, exact.get_parameter(name).bfloat16()) for name, value in rounded.named_parameters())


@pytest.mark.parametrize(
    "kind, weights",
    [
        (Kind.Q4_0, Int4Weight),
        (Kind.Q4_1, Int4Weight),
        (Kind.Q8_0, Int8Weight),
        (Kind.Q5_0, Int8Weight),
        (Kind.Q5_1, Int8Weight),
        (Kind.F16, Int8Weight),
        (Kind.BF16, Int8Weight),
        (Kind.F32, Int8Weight),
    ],
)
def test_served_by_default_blocks_stay_what_they_are_and_other_kinds_become_int8(kind, weights, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", make_model("Llama"), kind=kind)
    runner = load_runner(path, device="cpu", max_tokens_in_use=100).runner
    exact = load_model(path, device=CPU, dtype=torch.float32).model.layers[1].mlp.down_proj.weight
    served = runner._model.model.layers[1].mlp.down_proj.weight_tiles
    assert type(served) is weights
    assert runner._pages.arena.layout.dtype == torch.int8
    groups = exact.view(len(exact), -1, 32)
    step = groups.abs().amax(2, keepdim=True) / 127
    off = (served.unpacked().view_as(groups) - groups).abs()
    kept = kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)
    assert (off <= (0 if kept else 0.6 * step)).all()


@pytest.mark.parametrize("kind", sorted(gguf.quants._type_traits, key=lambda kind: kind.name))
def test_every_block_type_reads_the_same_in_pieces_as_at_once(kind, tmp_path, monkeypatch):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # No byte makes a half-precision scale infinite.
    rows = np.random.default_rng(0).integers(0, 0x78, (6, 2 * block_bytes), np.uint8)
    (tmp_path / "rows").write_bytes(rows.tobytes())
    monkeypatch.setattr("helix_gateway.runtime.checkpoints.gguf_tensors._PIECE_BYTES", 4 * block_bytes)
    file = type("File", (), {"path": tmp_path / "rows", "rows": GGUFFile.rows})()
    values = read_tensor(file, TensorInfo("rows", (2, 3, 2 * block), kind, 0, rows.size), torch.float32)
    assert np.array_equal(values.numpy(), gguf.quants.dequantize(rows, kind).reshape(2, 3, 2 * block))


def test_the_default_model_knows_its_facts(smollm2_path):
    model = load_model(smollm2_path, device=CPU)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49_152)
    assert config.max_position_embeddings == 8192
    assert config.eos_token_id == 2
    # "The capital of France is", in the file's own tokens; the most likely next one is " Paris".
    file = GGUFFile(Path(smollm2_path))
    tokens = file.get_array("tokenizer.ggml.tokens")
    prompt = torch.tensor([[tokens.index(word) for word in ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")]])
    assert tokens[logits(model, prompt)[0, -1].argmax()] == "ĠParis"


def tokens_of(*special):
    def extra(writer):
        names = ["<pad>", "<s>", "</s>", *special]
        writer.add_token_list(names + [f"word{index}" for index in range(96 - len(names))])
        writer.add_token_types([3] * len(names) + [1] * (96 - len(names)))

    return extra


@pytest.mark.parametrize(
    "extra, leave_out, message",
    [
        (lambda writer: writer.add_expert_count(4), (), "mixture of experts"),
        (lambda writer: writer.add_uint16("split.count", 3), (), "one of 3 pieces"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE), ("blk.1.ffn_up.weight",), "lacks the weights"),
        (lambda writer: None, ("token_embd.weight",), "no token embeddings"),
        (lambda writer: writer.add_tensor("blk.0.other.weight", np.ones(4, np.float32)), (), "no use for: blk.0.other.weight"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.arange(8, dtype=np.float32) + 1), (), "not Llama 3's"),
    ],
)  # fmt: skip
def test_what_a_file_hides_is_refused_in_one_line(extra, leave_out, message, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", make_model("Llama"), extra=extra, leave_out=leave_out)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(path, device=CPU)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "mamba")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="architecture 'mamba'"):
        load_model(str(tmp_path / "model.gguf"), device=CPU)


def test_a_file_cut_short_anywhere_is_refused_in_one_line(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", make_model("Llama"), extra=tokens_of("<|im_end|>"))
    content = (tmp_path / "model.gguf").read_bytes()
    for kept in [0, 3, 4, 8, 20, 30, *range(50, 8_000, 397), len(content) // 2, len(content) - 40]:
        (tmp_path / "model.gguf").write_bytes(content[:kept])
        with pytest.raises(ModelLoadError, match="no whole GGUF file") as caught:
            model_config(path)
        assert "\n" not in str(caught.value)


def test_a_damaged_header_never_gives_more_than_one_line(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", make_model("Llama"), extra=tokens_of("<|im_end|>"))
    content = (tmp_path / "model.gguf").read_bytes()
    random = np.random.default_rng(0)
    messages = []
    for _ in range(300):
        damaged = bytearray(content)
        for place in random.integers(0, 4_000, 3):
            damaged[place] = random.integers(0, 256)
        (tmp_path / "model.gguf").write_bytes(damaged)
        try:
            model_config(path)
        except ModelLoadError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert not any("\n" in message for message in messages)
