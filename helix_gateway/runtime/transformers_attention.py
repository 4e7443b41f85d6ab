"""Where transformers' models meet the pages: the attention function that replaces theirs.

`transformers.AttentionInterface` hands every layer's queries, keys and values to `paged_attention`, which passes them to
whatever the runner hung on that layer's module; there is no state here.  No mask is registered beside it, so that
transformers builds none: who sees what follows from positions and windows alone.  Knows nothing about how pages lie.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from helix_gateway.runtime.paged_attention import PagedAttention

NAME = "helix_paged"
"""Under which the attention function is registered with transformers."""

_LAYER = "helix_layer"


class PagedLayer:
    """One attention module's place in a `PagedAttention`."""

    def __init__(self, attention: PagedAttention, layer: int) -> None:
        self.attention = attention
        self.layer = layer


def attach(module: nn.Module, layer: PagedLayer) -> None:
    """Tell an attention module which layer of which pages it is."""
    setattr(module, _LAYER, layer)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls; the arguments that it ignores were looked at when the model was probed at load."""
    layer: PagedLayer = getattr(module, _LAYER)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attention.attend(layer.layer, query, key, value, factor, softcap), None


AttentionInterface.register(NAME, paged_attention)
