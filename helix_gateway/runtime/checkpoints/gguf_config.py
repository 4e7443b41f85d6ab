"""From a GGUF file's metadata to the transformers configuration of the model that it holds.

The keys are llama.cpp's (its GGUF specification and, for what a family leaves out, the defaults that its loader
assumes).  Families are found by ``general.architecture``; any other is refused by name.  Mistral's files call
themselves llama, and are the same computation.  Knows nothing about how tensors are stored.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.checkpoints.gguf_file import GGUFFile, Scalar, TensorInfo
from helix_gateway.runtime.checkpoints.gguf_tensors import read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_DEFAULT_ROPE_BASE = 10_000.0
_LLAMA3_LOW_FREQ_FACTOR, _LLAMA3_HIGH_FREQ_FACTOR, _LLAMA3_CONTEXT = 1.0, 4.0, 8192
# The one size of each Gemma whose queries are scaled by hidden size over heads, not by head size.
_GEMMA2_27B_BLOCKS, _GEMMA3_27B_BLOCKS = 46, 62


class Metadata:
    """Metadata of one file under its architecture's prefix.

    Raises:
        ModelLoadError: a key that the model cannot do without is missing, or is of another type.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        architecture = file.get("general.architecture")
        if architecture is None:
            raise ModelLoadError(f"{file.path} does not say its architecture, so it is no model.")
        self.architecture = str(architecture)

    def get(self, key: str) -> Scalar | None:
        """Return a value, or None where the file does not have it."""
        return self.file.get(f"{self.architecture}.{key}")

    def integer(self, key: str) -> int:
        """Return a number that must be there, as an integer."""
        return int(self.number(key))

    def number(self, key: str) -> float:
        """Return a number that must be there."""
        value = self.optional(key)
        if value is None:
            raise ModelLoadError(f"{self.file.path} lacks the number {self.architecture}.{key} in its metadata.")
        return value

    def optional(self, key: str) -> float | None:
        """Return a number, or None where the file does not have it."""
        value = self.get(key)
        return None if value is None or isinstance(value, str) else float(value)

    def has_tensor(self, name: str) -> bool:
        """Whether the file holds a tensor of this name."""
        return name in self.file.tensors


@dataclass(frozen=True, slots=True)
class DescribedConfig:
    """A transformers configuration as its metadata describes it, not made yet."""

    class_name: str
    fields: Mapping[str, Any]

    def config(self) -> "PreTrainedConfig":
        """Make it."""
        import transformers

        config: PreTrainedConfig = getattr(transformers, self.class_name)(**self.fields)
        return config


def describe_config(file: GGUFFile) -> DescribedConfig:
    """What the transformers configuration of the model in a GGUF file is.

    Raises:
        ModelLoadError: the architecture is not served, or the metadata is incomplete.
    """
    metadata = Metadata(file)
    family = _family(metadata)
    _refuse_variants(metadata)
    return DescribedConfig(family.config_class, _common(metadata) | family.own_fields(metadata))


@dataclass(frozen=True, slots=True)
class _Family:
    config_class: str
    own_fields: Callable[[Metadata], dict[str, Any]]


def _family(metadata: Metadata) -> _Family:
    family = _FAMILIES.get(metadata.architecture)
    if family is None:
        raise ModelLoadError(
            f"{metadata.file.path} is a GGUF of architecture {metadata.architecture!r}, which Helix does not read; "
            f"it reads {', '.join(_FAMILIES)}. The same model in safetensors may work."
        )
    return family


def _refuse_variants(metadata: Metadata) -> None:
    """Refuse what hides behind a served architecture's name but is computed in another way."""
    if metadata.optional("expert_count"):
        raise ModelLoadError(f"{metadata.file.path} is a mixture of experts, which Helix does not read from GGUF.")
    pieces = metadata.file.get("split.count")
    if isinstance(pieces, int) and pieces > 1:
        raise ModelLoadError(
            f"{metadata.file.path} is one of {pieces} pieces of a model; join them first (llama-gguf-split --merge)."
        )


def _common(metadata: Metadata) -> dict[str, Any]:
    embedding = metadata.file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelLoadError(f"{metadata.file.path} has no token embeddings, so it is no whole model.")
    heads = metadata.integer("attention.head_count")
    bos = metadata.file.get("tokenizer.ggml.bos_token_id")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": metadata.integer("embedding_length"),
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata.optional("attention.head_count_kv") or heads),
        "head_dim": _head_dim(metadata),
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not metadata.has_tensor("output.weight"),
        "bos_token_id": bos,
        "eos_token_id": metadata.file.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.file.get("tokenizer.ggml.padding_token_id"),
    }


def _head_dim(metadata: Metadata) -> int:
    heads = metadata.integer("attention.head_count")
    return int(metadata.optional("attention.key_length") or metadata.integer("embedding_length") // heads)


def _llama(metadata: Metadata) -> dict[str, Any]:
    return {
        "attention_bias": metadata.has_tensor("blk.0.attn_q.bias"),
        "mlp_bias": metadata.has_tensor("blk.0.ffn_gate.bias"),
        "rope_parameters": _rope(metadata),
    }


def _qwen(metadata: Metadata) -> dict[str, Any]:
    return {"rope_parameters": _rope(metadata)}


def _phi3(metadata: Metadata) -> dict[str, Any]:
    context = metadata.integer("context_length")
    original = int(metadata.optional("rope.scaling.original_context_length") or context)
    rope = _rope(metadata) | {"partial_rotary_factor": _rotary_dim(metadata) / _head_dim(metadata)}
    return {
        "original_max_position_embeddings": original,
        "sliding_window": int(metadata.optional("attention.sliding_window") or 0) or None,
        "rope_parameters": rope | _phi3_long_rope(metadata, original),
    }


def _phi3_long_rope(metadata: Metadata, original: int) -> dict[str, Any]:
    long, short = (metadata.file.tensors.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
    if long is None or short is None:
        return {}
    return {
        "rope_type": "longrope",
        "long_factor": _floats(metadata, long),
        "short_factor": _floats(metadata, short),
        "original_max_position_embeddings": original,
    }


def _floats(metadata: Metadata, info: TensorInfo) -> list[float]:
    return [float(value) for value in read_tensor(metadata.file, info, torch.float32).tolist()]


def _gemma2(metadata: Metadata) -> dict[str, Any]:
    window = metadata.optional("attention.sliding_window")
    return {
        "query_pre_attn_scalar": _gemma_query_scalar(metadata, _GEMMA2_27B_BLOCKS),
        "sliding_window": 4096 if window is None else int(window),
        "attn_logit_softcapping": metadata.optional("attn_logit_softcapping") or 50.0,
        "final_logit_softcapping": metadata.optional("final_logit_softcapping") or 30.0,
        "layer_types": _layer_types(metadata, every=2),
        "rope_parameters": _rope(metadata),
    }


def _gemma3(metadata: Metadata) -> dict[str, Any]:
    window = metadata.optional("attention.sliding_window")
    local_base = metadata.optional("rope.freq_base_swa") or _DEFAULT_ROPE_BASE
    return {
        "query_pre_attn_scalar": _gemma_query_scalar(metadata, _GEMMA3_27B_BLOCKS),
        "sliding_window": int(window or 0) or None,
        "final_logit_softcapping": metadata.optional("final_logit_softcapping"),
        "layer_types": _layer_types(metadata, every=6 if window else 1),
        "rope_parameters": {
            "full_attention": _rope(metadata),
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
        },
    }


def _gemma_query_scalar(metadata: Metadata, blocks_of_27b: int) -> float:
    scale = metadata.optional("attention.scale")
    if scale:
        return scale**-2
    if metadata.integer("block_count") == blocks_of_27b:
        return metadata.number("embedding_length") / metadata.number("attention.head_count")
    return _head_dim(metadata)


def _layer_types(metadata: Metadata, *, every: int) -> list[str]:
    """Every so many layers attend to everything, those between to a window."""
    period = int(metadata.optional("attention.sliding_window_pattern") or every)
    layers = range(1, metadata.integer("block_count") + 1)
    return ["sliding_attention" if layer % period else "full_attention" for layer in layers]


def _rotary_dim(metadata: Metadata) -> int:
    return int(metadata.optional("rope.dimension_count") or _head_dim(metadata))


def _rope(metadata: Metadata) -> dict[str, Any]:
    base = metadata.optional("rope.freq_base") or _DEFAULT_ROPE_BASE
    return {"rope_theta": base, "rope_type": "default"} | (_rope_factors(metadata, base) or _rope_scaling(metadata))


def _rope_scaling(metadata: Metadata) -> dict[str, Any]:
    kind = metadata.get("rope.scaling.type") or "linear"
    factor = metadata.optional("rope.scaling.factor") or metadata.optional("rope.scale_linear")
    if factor is None or factor == 1.0 or kind == "none":
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor} | _yarn(metadata)
    if kind == "longrope":
        return {}
    raise ModelLoadError(f"{metadata.file.path} scales its rotary positions by {kind!r}, which Helix does not know.")


def _yarn(metadata: Metadata) -> dict[str, Any]:
    original = metadata.optional("rope.scaling.original_context_length")
    optional = {
        "original_max_position_embeddings": None if original is None else int(original),
        "beta_fast": metadata.optional("rope.scaling.yarn_beta_fast"),
        "beta_slow": metadata.optional("rope.scaling.yarn_beta_slow"),
        "attention_factor": metadata.optional("rope.scaling.attn_factor"),
    }
    return {key: value for key, value in optional.items() if value is not None}


def _rope_factors(metadata: Metadata, base: float) -> dict[str, Any] | None:
    """Llama 3's files hold what each rotary frequency is divided by, not the numbers that it was computed from."""
    info = metadata.file.tensors.get("rope_freqs.weight")
    if info is None:
        return None
    factors = np.asarray(_floats(metadata, info))
    dim = _rotary_dim(metadata)
    wavelengths = 2 * math.pi * base ** (np.arange(0, dim, 2) / dim)
    factor = float(factors.max())
    if factors.shape == wavelengths.shape and np.allclose(factors, _llama3_factors(wavelengths, factor), rtol=1e-4):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
            "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": _LLAMA3_CONTEXT,
        }
    raise ModelLoadError(f"{metadata.file.path} divides its rotary frequencies in a way that is not Llama 3's.")


def _llama3_factors(wavelengths: "np.ndarray[Any, np.dtype[np.float64]]", factor: float) -> Any:
    """Long waves are divided by the factor, short ones by 1, those between by a smooth mixture (Llama 3.1)."""
    span = _LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR
    smooth = np.clip((_LLAMA3_CONTEXT / wavelengths - _LLAMA3_LOW_FREQ_FACTOR) / span, 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


_FAMILIES = {
    "llama": _Family("LlamaConfig", _llama),
    "qwen2": _Family("Qwen2Config", _qwen),
    "qwen3": _Family("Qwen3Config", _qwen),
    "gemma2": _Family("Gemma2Config", _gemma2),
    "gemma3": _Family("Gemma3TextConfig", _gemma3),
    "phi3": _Family("Phi3Config", _phi3),
}
