"""The float weights of a Llama, and a step's memory, handed to `layers.py` as it wants them."""

from typing import Any

import numpy as np
import torch
from torch import nn

from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.cpu.angle_tables import AngleTables
from helix_gateway.runtime.cpu.attention import ACTIVATIONS, CpuPagedAttention
from helix_gateway.runtime.cpu.joined_tiles import join_tiles
from helix_gateway.runtime.cpu.layers import FIELDS, Angles, Scratch, Weights, compiled_layers, norm_row
from helix_gateway.runtime.cpu.linear import FloatWeight, PackedLinear
from helix_gateway.runtime.cpu.parts import LayerParts, Parts
from helix_gateway.runtime.cpu.products import host_shape
from helix_gateway.runtime.cpu.threads import configure_threads
from helix_gateway.runtime.heap import return_freed_blocks

_GAP = 16
"""Elements between rows of activations, so that rows of 1,024 do not all fall on the same cache lines."""


class LlamaStep:
    """The forward of a Llama-like model over the pages of its attention.

    Args:
        parts: the model, whose structure is plain; its layers' weights are joined in place.
        attention: the runner's.
    """

    def __init__(self, parts: Parts, attention: CpuPagedAttention) -> None:
        structure = parts.structure
        self._attention = attention
        self._tables = AngleTables(parts.rotary, structure.rotary_kinds)
        self._embedding: nn.Module = parts.embedding
        self._head: PackedLinear = parts.head
        weight = self._head.weight_tiles
        assert isinstance(weight, FloatWeight)
        self._dtype: torch.dtype = weight.dtype
        self._norm = parts.norm.numpy()
        self._eps = np.float32(structure.eps)
        self._kept: list[torch.Tensor] = []
        """Memory that the compiled step knows by address only."""
        layers = np.array([self._describe(layer) for layer in parts.layers], np.int64)
        return_freed_blocks()
        sizes = np.array(
            [[joined[0].in_features, sum(part.out_features for part in joined)] for joined in parts.layers[0].products],
            np.int64,
        )
        self._weights = Weights(layers, sizes, structure.scaling, self._eps)
        attention.link(self._dtype)
        self._run = compiled_layers(weight.bits, host_shape())

    def _describe(self, layer: LayerParts) -> list[int]:
        fields = []
        for parts in layer.products:
            fields += [join_tiles(parts).data_ptr(), self._keep(torch.cat([part.bias_values for part in parts]))]
        fields += [self._keep(norm.contiguous()) for norm in layer.norms[:2] if norm is not None]
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
        return self._tables.reaching(longest)
