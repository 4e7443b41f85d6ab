"""Finds the compiled step of a model, where there is one.

There are steps for models of `parts.py`'s parts: in float those that have nothing which the first Llama lacks
(`llama.py`), quantised its relatives too (`quantised_llama.py`).  The compiled step must then agree with transformers'
forward on some tokens.  What does not fit, or does not agree, is served through transformers' modules as before.
"""

from collections.abc import Callable

import torch

from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.cpu.attention import CpuPagedAttention
from helix_gateway.runtime.cpu.linear import FloatWeight
from helix_gateway.runtime.cpu.llama import LlamaStep
from helix_gateway.runtime.cpu.parts import Parts
from helix_gateway.runtime.cpu.quantised_llama import QuantisedLlamaStep, is_quantised_alike


def step_of(parts: Parts, attention: object) -> Callable[[StepBatch], torch.Tensor] | None:
    """The compiled step that fits a model of these parts over such pages, else None."""
    if not isinstance(attention, CpuPagedAttention):
        return None
    if isinstance(parts.head.weight_tiles, FloatWeight):
        return LlamaStep(parts, attention) if _is_plain(parts, attention) else None
    return QuantisedLlamaStep(parts, attention) if is_quantised_alike(parts) else None


def _is_plain(parts: Parts, attention: CpuPagedAttention) -> bool:
    """Whether there is nothing in a model that `layers.py` does not compute."""
    norms = [weight is not None for weight in parts.layers[0].norms]
    return parts.structure.is_plain and attention.is_uniform and all(norms[:2]) and not any(norms[2:])
