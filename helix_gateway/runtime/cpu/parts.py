"""What a Llama and its relatives are made of, as data: the parts of each layer, and the factors that a model has for all.

Whoever computes a step by it (`llama.py`, `quantised_llama.py`) needs to know no modules.  Where it comes from, a model's
modules (`structures.py`) or what an earlier start wrote down of them (`description.py`), it does not tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from helix_gateway.runtime.cpu.linear import PackedLinear
from helix_gateway.runtime.rotary import RotaryTable

SILU, GELU = range(2)
"""Activations of the gate; GELU is the one by tanh."""
UNCAPPED = float("inf")
"""What a softcap that caps nothing is."""


@dataclass(frozen=True, slots=True)
class Structure:
    """What all layers of a model have in common, and what happens before the first and after the last."""

    scaling: float
    """Factor of attention's scores."""
    softcap: float
    """Of attention's scores, `UNCAPPED` where there is none."""
    eps: float
    """Of all norms."""
    activation: int
    """`SILU` or `GELU`."""
    residual: float
    """Factor of what attention and MLP add to the residual stream."""
    embedding: float
    """Factor of the embedding's rows."""
    logits: float
    """Factor of the logits."""
    logits_softcap: float
    """Of the logits, `UNCAPPED` where there is none."""
    rotary_kinds: tuple[str, ...]
    """What each layer tells the rotary embedding, where it has several tables; else empty."""

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing in it that Llama's first version lacks."""
        factors, caps = (self.residual, self.embedding, self.logits), (self.softcap, self.logits_softcap)
        is_first = factors == (1.0, 1.0, 1.0) and caps == (UNCAPPED, UNCAPPED)
        return is_first and self.activation == SILU and not any(self.rotary_kinds)


class LayerNorms(NamedTuple):
    """What a layer's norms multiply by, float32, None where it has none; norms after attention and MLP
    norm what goes into the residual stream.
    """

    before_attention: torch.Tensor | None
    before_mlp: torch.Tensor | None
    after_attention: torch.Tensor | None
    after_mlp: torch.Tensor | None
    query: torch.Tensor | None
    """Of each head, or of all heads together: it is as long as what it norms."""
    key: torch.Tensor | None


class LayerParts(NamedTuple):
    """One layer."""

    products: tuple[tuple[PackedLinear, ...], ...]
    """The linear layers, those that share an input together, in the order in which they compute."""
    norms: LayerNorms


@dataclass(frozen=True, slots=True)
class Parts:
    """A whole model; its linear layers may be moved and joined by whoever computes with them."""

    structure: Structure
    embedding: nn.Module
    layers: Sequence[LayerParts]
    norm: torch.Tensor
    """What the last norm multiplies by, float32."""
    head: PackedLinear
    rotary: RotaryTable

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding's matrix."""
        return getattr(self.embedding, "weight_tiles", None) is self.head.weight_tiles
