"""Finds models whose layers are Llama's, and runs a whole step of them through `layers.py`.

Found by structure, not by name: a layer must have the parts of a Llama's, all packed and alike, and their code must be,
line for line, that of transformers' own Llama, Mistral or Qwen2, since equal parts can be put to other uses (rotary
in other pairs, or none; queries scaled by position).  The compiled step must then agree with transformers' forward on some
tokens.  What does not fit, or does not agree, is served through transformers' modules as before.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import structlog
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.cpu.attention import ACTIVATIONS, CpuPagedAttention
from helix_gateway.runtime.cpu.layers import FIELDS, Angles, Scratch, Weights, compiled_layers, norm_row
from helix_gateway.runtime.cpu.linear import FloatWeight, PackedLinear
from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS
from helix_gateway.runtime.cpu.packed import PackedWeight
from helix_gateway.runtime.cpu.products import host_shape
from helix_gateway.runtime.cpu.threads import configure_threads
from helix_gateway.runtime.cpu.weight_memory import WeightMemory
from helix_gateway.runtime.heap import return_freed_blocks
from helix_gateway.runtime.rotary import RotaryTable

log = structlog.get_logger(__name__)

_GAP = 16
"""Elements between rows of activations, so that rows of 1,024 do not all fall on the same cache lines."""
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class LlamaStep:
    """The forward of a Llama-like model over the pages of its attention.

    Args:
        model: a transformers ``ForCausalLM`` that `is_llama_like`; its layers' weights are joined in place.
        attention: the runner's.
        rotary: the table that the model's rotary embedding has become.
    """

    def __init__(self, model: Any, attention: CpuPagedAttention, rotary: RotaryTable) -> None:
        base = model.base_model
        self._attention = attention
        self._rotary = rotary
        self._embedding: nn.Module = base.embed_tokens
        self._head: PackedLinear = model.get_output_embeddings()
        self._dtype: torch.dtype = self._head.weight_tiles.dtype
        self._norm = base.norm.weight.detach().float().numpy()
        self._eps = np.float32(base.norm.variance_epsilon)
        self._kept: list[torch.Tensor] = []
        """Memory that the compiled step knows by address only."""
        layers = np.array([self._describe(layer) for layer in base.layers], np.int64)
        return_freed_blocks()
        first = base.layers[0]
        sizes = np.array(
            [[parts[0].in_features, sum(part.out_features for part in parts)] for parts in products_of(first)], np.int64
        )
        self._weights = Weights(layers, sizes, float(first.self_attn.scaling), self._eps)
        self._run = compiled_layers(self._head.weight_tiles.bits, host_shape())

    def _describe(self, layer: Any) -> list[int]:
        fields = []
        for parts in products_of(layer):
            fields += [join_tiles(parts).data_ptr(), self._keep(torch.cat([part.bias_values for part in parts]))]
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            fields.append(self._keep(norm.weight.detach().float().contiguous()))
        assert len(fields) == FIELDS
        return fields

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def __call__(self, batch: StepBatch) -> torch.Tensor:
        """Logits [num_rows, vocab_size] of ``batch.logits_rows``, in the weights' dtype."""
        ids = torch.from_numpy(batch.token_ids).long()
        hidden = self._embedding(ids).float().contiguous().numpy()
        self._through_layers(hidden, int(batch.context_lens.max()))
        wanted = np.empty((len(batch.logits_rows), hidden.shape[1]), np.float32)
        for place, row in enumerate(batch.logits_rows):
            norm_row(hidden[row], self._norm, self._eps, wanted[place])
        return self._head.weight_tiles.multiply(torch.from_numpy(wanted).to(self._dtype), self._head.bias_values)

    def _through_layers(self, hidden: np.ndarray[Any, np.dtype[np.float32]], longest: int) -> None:
        rows, sizes = len(hidden), self._weights.sizes
        product = torch.empty(rows * int(sizes[:, 1].max()), dtype=self._dtype)
        attended = torch.empty(rows * int(sizes[1, 0]), dtype=self._dtype)
        wide = np.empty((rows, int(sizes[:, 0].max()) + _GAP), np.float32)
        scratch = Scratch(ACTIVATIONS[self._dtype], wide, product.data_ptr(), attended.data_ptr())
        plan, pages = self._attention.step()
        angles = self._angles(longest)
        self._run(configure_threads(), plan, pages, self._weights, hidden, scratch, angles)

    def _angles(self, longest: int) -> Angles:
        return angles_of(self._rotary, longest)


def angles_of(rotary: RotaryTable, longest: int) -> Angles:
    """The tables of a rotary embedding for contexts of up to ``longest`` tokens."""
    rotary.reserve(longest)
    cosines, sines = rotary.tables(torch.empty(0))
    return Angles(cosines.numpy(), sines.numpy())


def find_llama_step(
    model: Any, attention: object, rotary: Sequence[RotaryTable]
) -> Callable[[StepBatch], torch.Tensor] | None:
    """The compiled step of a model whose structure it fits, else None."""
    if not isinstance(attention, CpuPagedAttention) or not attention.is_uniform or len(rotary) != 1:
        return None
    if not is_llama_like(model):
        return None
    if isinstance(model.get_output_embeddings().weight_tiles, FloatWeight):
        return LlamaStep(model, attention, rotary[0])
    from helix_gateway.runtime.cpu.quantised_llama import QuantisedLlamaStep, is_quantised_alike

    return QuantisedLlamaStep(model, attention, rotary[0]) if is_quantised_alike(model) else None


def products_of(layer: Any) -> tuple[tuple[PackedLinear, ...], ...]:
    """The linear layers of a Llama's layer, those that share an input together, in the order in which they compute."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )


def is_llama_like(model: Any) -> bool:
    """Whether every layer has exactly the parts of a Llama's, all packed."""
    base, head = model.base_model, model.get_output_embeddings()
    needed = ("embed_tokens", "layers", "norm")
    if not all(hasattr(base, name) for name in needed) or not isinstance(head, PackedLinear):
        return False
    if not _is_norm(base.norm) or not all(_is_llama_layer(layer) for layer in base.layers):
        return False
    return len({_measures(layer) for layer in base.layers}) == 1 and _code(base.layers[0]) in _known_code()


def _measures(layer: Any) -> tuple[object, ...]:
    """What the compiled step takes from one layer for all."""
    products = [(part.in_features, part.out_features) for part in layer.modules() if isinstance(part, PackedLinear)]
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return (layer.self_attn.scaling, *products, *(norm.variance_epsilon for norm in norms))


def _code(layer: Any) -> tuple[str, ...]:
    """The source of what a layer computes; class names differ between families, what stands under ``forward`` may not."""
    parts = (layer, layer.self_attn, layer.mlp, layer.input_layernorm)
    module = sys.modules[type(layer.self_attn).__module__]
    functions = [type(part).forward for part in parts] + [module.apply_rotary_pos_emb, module.rotate_half]
    return tuple(inspect.getsource(inspect.unwrap(function)) for function in functions)


@cache
def _known_code() -> frozenset[tuple[str, ...]]:
    """Of the families whose layers the compiled step computes."""
    known = set()
    for config_class in (LlamaConfig, MistralConfig, Qwen2Config):
        config = config_class(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            known.add(_code(model.base_model.layers[0]))
    return frozenset(known)


def _is_llama_layer(layer: Any) -> bool:
    return (
        _parts(layer) == _LAYER_PARTS
        and _parts(layer.self_attn) == _ATTENTION_PARTS
        and _parts(layer.mlp) == _MLP_PARTS
        and all(
            _is_whole(part)
            for part in (*layer.self_attn.children(), *layer.mlp.children())
            if part is not layer.mlp.act_fn
        )
        and _is_silu(layer.mlp.act_fn)
        and _is_norm(layer.input_layernorm)
        and _is_norm(layer.post_attention_layernorm)
        and isinstance(getattr(layer.self_attn, "scaling", None), float)
    )


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_whole(part: nn.Module) -> bool:
    """Packed, and of whole tiles, so that several can be joined."""
    return isinstance(part, PackedLinear) and part.out_features % TILE_CHANNELS == 0


def _is_norm(module: Any) -> bool:
    return hasattr(module, "variance_epsilon") and isinstance(getattr(module, "weight", None), torch.Tensor)


def _is_silu(activation: Any) -> bool:
    x = torch.linspace(-4, 4, 9)
    return torch.equal(activation(x), nn.functional.silu(x))


def join_tiles(parts: Sequence[PackedLinear], memory: WeightMemory | None = None) -> torch.Tensor:
    """Tiles of several products one after another; each part goes on as a view of them, so nothing is held twice.

    Where there is a memory for weights, they are moved there.
    """
    weights: list[PackedWeight] = [part.weight_tiles for part in parts]
    joined = weights[0].tiles if len(weights) == 1 else torch.cat([weight.tiles for weight in weights])
    if memory is not None:
        joined = memory.move(joined)
    first = 0
    for weight in weights:
        weight.tiles = joined[first : first + len(weight.tiles)]
        first += len(weight.tiles)
    return joined
