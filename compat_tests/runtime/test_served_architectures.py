"""What a model's attention does is found out by trying; what pages of keys and values cannot serve is refused by name."""

import pytest
import torch
from transformers import AttentionInterface

from compat_tests.tiny_models import TINY_MODELS, make_model
from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.context import context_length
from helix_gateway.runtime.groups import group_layers
from helix_gateway.runtime.probe import find_attention_layers

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
OLD = {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}
REFUSED = {
    "falcon": (COMMON, "0 of its 2 layers"),
    "bloom": (OLD, "0 of its 2 layers"),
    "mpt": ({"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 4}, "0 of its 2 layers"),
    "gpt_neo": (
        {"vocab_size": 128, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        "0 of its 2 layers",
    ),
    "xglm": (
        {"vocab_size": 128, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128},
        "0 of its 2 layers",
    ),
    "mamba": ({"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}, "recurrent state"),
    "jamba": (
        {**COMMON, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "num_experts": 2},
        "recurrent state",
    ),
    "qwen3_next": (
        {
            **COMMON,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        "recurrent state",
    ),
    "falcon_h1": (
        {**COMMON, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16},
        "recurrent state",
    ),
    "lfm2": ({**COMMON, "layer_types": ["conv", "full_attention"]}, "1 of its 2 layers"),
    "gpt_oss": ({**COMMON, "head_dim": 16, "num_local_experts": 4, "sliding_window": 16}, "asks for s_aux"),
    "llama4_text": (
        {
            **COMMON,
            "head_dim": 16,
            "num_local_experts": 2,
            "attention_chunk_size": 16,
            "intermediate_size_mlp": 64,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "chunks, not a window",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_pages_cannot_serve_is_refused_by_name(kind):
    options, reason = REFUSED[kind]
    _, model = make_model(kind, options, 0)
    with pytest.raises(ModelLoadError, match=reason) as refusal:
        find_attention_layers(model)
    assert type(model).__name__ in str(refusal.value)
    assert "\n" not in str(refusal.value)


GROUPS = {
    "llama": [(None, 3)],
    "mistral": [(13, 2)],
    "qwen2": [(None, 2)],
    "gemma2": [(9, 2), (None, 2)],
    "gemma3": [(7, 3), (None, 1)],
    "gpt2": [(None, 2)],
    "starcoder2": [(11, 2)],
}


@pytest.mark.parametrize("name", GROUPS)
def test_windows_are_those_of_the_masks_that_transformers_builds(name):
    _, model = TINY_MODELS[name](0)
    layers, vocab_size = find_attention_layers(model)
    groups = group_layers("m", [layer.use.shape for layer in layers])
    assert [(group.shape.window, len(group.layers)) for group in groups] == GROUPS[name]
    assert vocab_size == 256


def test_a_probe_leaves_the_model_as_it_was():
    _, model = TINY_MODELS["llama"](0)
    ids = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        before = model(ids).logits
        find_attention_layers(model)
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "eager"


def test_tokens_that_see_one_another_outside_of_attention_are_noticed():
    _, model = TINY_MODELS["llama"](0)
    plain = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: plain(x + x.roll(1, 1))
    with pytest.raises(ModelLoadError, match="outside of attention"):
        find_attention_layers(_three_layers(model))


def _three_layers(model):
    """The last layer's attention shows what the one before it mixed."""
    assert len(model.model.layers) == 3
    return model


def test_a_model_whose_forward_breaks_is_refused_with_the_reason():
    _, model = TINY_MODELS["llama"](0)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(ModelLoadError, match=r"LlamaForCausalLM is not served: a trial run fails with RuntimeError"):
        find_attention_layers(model)


def test_an_argument_that_nobody_honours_is_never_ignored():
    _, model = TINY_MODELS["llama"](0)
    attention = model.model.layers[0].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **named: plain(*args, **named, s_aux=torch.zeros(4))
    with pytest.raises(ModelLoadError, match="asks for s_aux"):
        find_attention_layers(model)


@pytest.mark.parametrize(
    "rope, length",
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 512),
        (
            {
                "rope_type": "longrope",
                "original_max_position_embeddings": 32,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
            },
            32,
        ),
        ({"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 128}, 128),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_a_context_ends_where_a_rotary_regime_would_change(rope, length):
    config, _ = make_model(
        "llama", {**COMMON, "max_position_embeddings": 512, "rope_parameters": {"rope_theta": 1e4, **rope}}, 0
    )
    assert context_length(config) == length


def test_the_paged_attention_is_registered_without_a_mask():
    from transformers import AttentionMaskInterface

    from helix_gateway.runtime import transformers_attention

    assert transformers_attention.NAME in AttentionInterface()
    assert transformers_attention.NAME not in AttentionMaskInterface()
