"""Tiny random models of every architecture that Helix is tested with: a few thousand parameters, made in the test.

`TINY_MODELS` maps a name to ``make(seed) -> (config, model)``.  Weights are scaled up from transformers' initialisation,
so that logits differ clearly from token to token and the best one is seldom a near tie.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 256
MAX_POSITIONS = 512

_COMMON = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE_OPTIONS = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
"""Of a tiny model of any family with a configuration like Llama's."""
_GPT2_LIKE = {**_COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS}
_ALTERNATING = ["sliding_attention", "full_attention"]

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**LLAMA_LIKE_OPTIONS, "num_hidden_layers": 3}),
    "mistral": ("mistral", {**LLAMA_LIKE_OPTIONS, "sliding_window": 13}),
    "qwen2": ("qwen2", {**LLAMA_LIKE_OPTIONS, "use_sliding_window": False, "sliding_window": 8}),
    "qwen3": ("qwen3", {**LLAMA_LIKE_OPTIONS, "head_dim": 32}),
    "gemma2": (
        "gemma2",
        {
            **LLAMA_LIKE_OPTIONS,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "query_pre_attn_scalar": 16,
            "layer_types": _ALTERNATING * 2,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 20.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **LLAMA_LIKE_OPTIONS,
            "head_dim": 32,
            "num_hidden_layers": 4,
            "sliding_window": 7,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
    "phi3": ("phi3", {**LLAMA_LIKE_OPTIONS, "sliding_window": None}),
    "gpt2": ("gpt2", _GPT2_LIKE),
    "gpt_neox": ("gpt_neox", {**LLAMA_LIKE_OPTIONS, "rotary_pct": 0.25}),
    "opt": ("opt", {**LLAMA_LIKE_OPTIONS, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "olmo2": ("olmo2", LLAMA_LIKE_OPTIONS),
    "starcoder2": ("starcoder2", {**LLAMA_LIKE_OPTIONS, "sliding_window": 11}),
    "granite": (
        "granite",
        {**LLAMA_LIKE_OPTIONS, "logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    ),
    "cohere": ("cohere", {**LLAMA_LIKE_OPTIONS, "logit_scale": 0.5, "use_qk_norm": True}),
}


def make_model(kind: str, options: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """A random model of a transformers model type, in float32, in evaluation mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
            elif name.endswith("bias"):
                weight.normal_(std=0.1)
    return config, model


def _maker(kind: str, options: dict[str, Any]) -> Callable[[int], tuple[Any, Any]]:
    return lambda seed=0: make_model(kind, options, seed)


TINY_MODELS: dict[str, Callable[[int], tuple[Any, Any]]] = {
    name: _maker(kind, options) for name, (kind, options) in _CONFIGS.items()
}
