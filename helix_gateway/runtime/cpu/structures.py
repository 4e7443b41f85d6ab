"""Finds out whether a model's modules are those of a Llama or a relative, and what it is made of (`parts.py`).

Found by structure, not by name: a layer must have the parts of one of these families, all packed and alike, and their code
must be, line for line, that of transformers' own family, since equal parts can be put to other uses (rotary in other pairs,
or none; queries scaled by position).  What is outside of the layers (embedding, last norm, head) is read off the modules and
the configuration; whoever computes by it has to be held to transformers' forward.  Knows nothing about threads, pages
or steps, nor about how a packed layer multiplies.
"""

import inspect
import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from helix_gateway.runtime.cpu.emitter import LANES
from helix_gateway.runtime.cpu.linear import PackedLinear
from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS
from helix_gateway.runtime.cpu.parts import GELU, SILU, UNCAPPED, LayerNorms, LayerParts, Parts, Structure
from helix_gateway.runtime.rotary import RotaryTable

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "granite")
"""Those whose layers are known, by their model type."""
# Which norms stand before attention, before the MLP, after attention and after the MLP, by the norms that a layer has.
_NORMS: dict[frozenset[str], tuple[str | None, str | None, str | None, str | None]] = {
    frozenset(names for names in places if names is not None): places
    for places in (
        ("input_layernorm", "post_attention_layernorm", None, None),
        (
            "input_layernorm",
            "pre_feedforward_layernorm",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        ),
        (None, None, "post_attention_layernorm", "post_feedforward_layernorm"),
    )
}
_ATTENTION_PARTS = (
    {"q_proj", "k_proj", "v_proj", "o_proj"},
    {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    {"qkv_proj", "o_proj"},
)
_MLP_PARTS = ({"gate_proj", "up_proj", "down_proj", "act_fn"}, {"gate_up_proj", "down_proj", "activation_fn"})


class NormModules(NamedTuple):
    """The modules of `parts.LayerNorms`."""

    before_attention: nn.Module | None
    before_mlp: nn.Module | None
    after_attention: nn.Module | None
    after_mlp: nn.Module | None
    query: nn.Module | None
    key: nn.Module | None


def parts_of(model: Any, rotary: RotaryTable) -> Parts | None:
    """What a model of packed linear layers is made of; None where it is no relative of Llama's.

    Args:
        model: a transformers ``ForCausalLM``.
        rotary: the table that its rotary embedding has become.
    """
    structure = structure_of(model, rotary)
    if structure is None:
        return None
    base = model.base_model
    layers = [LayerParts(products_of(layer), _norm_weights(layer)) for layer in base.layers]
    return Parts(structure, base.embed_tokens, layers, norm_weight(base.norm), model.get_output_embeddings(), rotary)


def _norm_weights(layer: Any) -> LayerNorms:
    return LayerNorms(*(None if norm is None else norm_weight(norm) for norm in norms_of(layer)))


def structure_of(model: Any, rotary: RotaryTable) -> Structure | None:
    """What a model of packed linear layers is made of; None where it is no relative of Llama's."""
    base, head = model.base_model, model.get_output_embeddings()
    needed = ("embed_tokens", "layers", "norm")
    if not all(hasattr(base, name) for name in needed) or not isinstance(head, PackedLinear) or not _is_norm(base.norm):
        return None
    if not all(_is_known_layer(layer) for layer in base.layers):
        return None
    if len({_measures(layer) for layer in base.layers}) != 1 or not _is_known_code(model.config.model_type, base):
        return None
    structure = _read(model, rotary)
    return None if structure.logits != 1 and bool(head.bias_values.any()) else structure


def why_unknown(model: Any) -> str:
    """What keeps a model of packed linear layers from having parts, where `parts_of` says that it has none."""
    if model.config.model_type not in FAMILIES:
        return "its layers are not those of a family that has one"
    parts = [part for part in model.base_model.modules() if isinstance(part, PackedLinear) and not _is_whole(part)]
    widths = ", ".join(str(width) for width in sorted({part.out_features for part in parts}))
    return f"widths are no multiples of {TILE_CHANNELS}: {widths}" if widths else "its parts are put to another use"


def _read(model: Any, rotary: RotaryTable) -> Structure:
    config, base = model.config, model.base_model
    layer = base.layers[0]
    several = "layer_type" in inspect.signature(rotary.embedding.forward).parameters
    packed = float(getattr(base.embed_tokens, "factor", 1.0))
    return Structure(
        scaling=float(layer.self_attn.scaling),
        softcap=_cap(getattr(layer.self_attn, "attn_logit_softcapping", None)),
        eps=norm_eps(base.norm),
        activation=_activation(activation_of(layer)),  # type: ignore[arg-type]
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
        embedding=packed * float(getattr(base, "embedding_multiplier", 1.0)),
        logits=1.0 / float(getattr(config, "logits_scaling", 1.0)),
        logits_softcap=_cap(getattr(config, "final_logit_softcapping", None)),
        rotary_kinds=tuple(config.layer_types) if several else ("",) * len(base.layers),
    )


def _cap(softcap: float | None) -> float:
    return UNCAPPED if softcap is None else float(softcap)


def products_of(layer: Any) -> tuple[tuple[PackedLinear, ...], ...]:
    """The linear layers of a layer, those that share an input together, in the order in which they compute."""
    attention, mlp = layer.self_attn, layer.mlp
    is_joined = hasattr(attention, "qkv_proj")
    return (
        (attention.qkv_proj,) if is_joined else (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_up_proj,) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )


def norms_of(layer: Any) -> NormModules:
    """The norms of a layer."""
    names = _NORMS[frozenset(_parts(layer) - {"self_attn", "mlp"})]
    norms: list[nn.Module | None] = [None if name is None else getattr(layer, name) for name in names]
    query, key = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
    return NormModules(norms[0], norms[1], norms[2], norms[3], query, key)


def norm_weight(norm: Any) -> torch.Tensor:
    """float32, what a norm multiplies by; Gemma's, which say ``eps``, keep what is added to one."""
    weight: torch.Tensor = norm.weight.detach().float()
    return 1.0 + weight if adds_one(norm) else weight


def adds_one(norm: Any) -> bool:
    """Whether a norm keeps what is added to one."""
    return not hasattr(norm, "variance_epsilon")


def norm_eps(norm: Any) -> float:
    """What a norm adds to the mean square."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def activation_of(layer: Any) -> Any:
    """The activation of a layer's gate."""
    return layer.mlp.act_fn if hasattr(layer.mlp, "act_fn") else layer.mlp.activation_fn


def _activation(module: Any) -> int | None:
    """Which one it is, by what it answers."""
    x = torch.linspace(-4, 4, 64)
    known = {SILU: nn.functional.silu(x), GELU: nn.functional.gelu(x, approximate="tanh")}
    return next((kind for kind, y in known.items() if torch.allclose(module(x), y, rtol=1e-5, atol=1e-6)), None)


def _is_known_layer(layer: Any) -> bool:
    if not {"self_attn", "mlp"} <= _parts(layer) or frozenset(_parts(layer) - {"self_attn", "mlp"}) not in _NORMS:
        return False
    if _parts(layer.self_attn) not in _ATTENTION_PARTS or _parts(layer.mlp) not in _MLP_PARTS:
        return False
    norms = [norm for norm in norms_of(layer) if norm is not None]
    return (
        all(_is_whole(part) for parts in products_of(layer) for part in parts)
        and all(_is_norm(norm) and norm.weight.numel() % LANES == 0 for norm in norms)  # type: ignore[operator]
        and _activation(activation_of(layer)) is not None
        and isinstance(getattr(layer.self_attn, "scaling", None), float)
    )


def _parts(module: nn.Module) -> set[str]:
    """Names of a module's parts; dropout does nothing here."""
    return {name for name, part in module.named_children() if not isinstance(part, nn.Dropout)}


def _is_whole(part: nn.Module) -> bool:
    """Packed, and of whole tiles, so that several can be joined."""
    return isinstance(part, PackedLinear) and part.out_features % TILE_CHANNELS == 0


def _is_norm(module: Any) -> bool:
    has_eps = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    return has_eps and isinstance(getattr(module, "weight", None), torch.Tensor)


def _measures(layer: Any) -> tuple[object, ...]:
    """What is taken from one layer for all."""
    products = [(part.in_features, part.out_features) for parts in products_of(layer) for part in parts]
    norms = [None if norm is None else (norm_eps(norm), norm.weight.numel()) for norm in norms_of(layer)]  # type: ignore[operator]
    attention = layer.self_attn
    factors = (attention.scaling, getattr(attention, "attn_logit_softcapping", None))
    return (*factors, getattr(layer, "residual_multiplier", 1.0), _activation(activation_of(layer)), *products, *norms)


def _is_known_code(model_type: str, base: Any) -> bool:
    """Whether the layers compute what those of a known family compute; its own is looked at first, if it is one."""
    code = _code(base.layers[0], base.norm)
    families = sorted(FAMILIES, key=lambda family: family != model_type)
    return any(code == _family_code(family) for family in families)


def _code(layer: Any, norm: Any) -> tuple[str, ...]:
    """The source of what a layer computes; class names differ between families, what stands under ``forward`` may not."""
    parts = (
        layer,
        layer.self_attn,
        layer.mlp,
        *{type(part): part for part in (*norms_of(layer), norm) if part}.values(),
    )
    module = sys.modules[type(layer.self_attn).__module__]
    functions = [type(part).forward for part in parts] + [module.apply_rotary_pos_emb, module.rotate_half]
    helpers = [type(norm)._norm] if hasattr(norm, "_norm") else []
    return tuple(inspect.getsource(inspect.unwrap(function)) for function in (*functions, *helpers))


@cache
def _family_code(model_type: str) -> tuple[str, ...]:
    """Of transformers' own layers of a family."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config).base_model  # type: ignore[no-untyped-call]
        return _code(base.layers[0], base.norm)
