"""Finds the compiled step of a model, and runs a whole step of a Llama's float weights through `layers.py`.

There are steps for models of `parts.py`'s parts: in float those that have nothing which the first Llama lacks,
quantised its relatives too (`quantised_llama.py`).  The compiled step must then agree with transformers' forward on some
tokens.  What does not fit, or does not agree, is served through transformers' modules as before.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import structlog
import torch
from torch import nn

from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.cpu.attention import ACTIVATIONS, CpuPagedAttention
from helix_gateway.runtime.cpu.layers import FIELDS, Angles, Scratch, Weights, compiled_layers, norm_row
from helix_gateway.runtime.cpu.linear import FloatWeight, PackedLinear
from helix_gateway.runtime.cpu.packed import PackedWeight
from helix_gateway.runtime.cpu.parts import LayerParts, Parts
from helix_gateway.runtime.cpu.products import host_shape
from helix_gateway.runtime.cpu.threads import configure_threads
from helix_gateway.runtime.cpu.weight_memory import WeightMemory
from helix_gateway.runtime.heap import return_freed_blocks
from helix_gateway.runtime.rotary import RotaryTable

log = structlog.get_logger(__name__)

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


class AngleTables:
    """The tables of a rotary embedding, of each kind that a model's layers have, one behind the other."""

    def __init__(self, rotary: RotaryTable, layer_kinds: Sequence[str]) -> None:
        """``layer_kinds``: what each layer tells the embedding, empty where there is nothing to tell."""
        self._rotary = rotary
        self._kinds = list(dict.fromkeys(layer_kinds))
        self.kind_of = [self._kinds.index(kind) for kind in layer_kinds]
        """For each layer, which of the tables it reads."""
        self._sources: list[torch.Tensor] = []
        self._angles = Angles(*(np.zeros((1, 0, 0), np.float32) for _ in range(2)))

    def reaching(self, longest: int) -> Angles:
        """Tables for contexts of up to ``longest`` tokens; made anew only when they have grown."""
        self._rotary.reserve(longest)
        pairs = [self._rotary.tables(torch.empty(0), *filter(None, [kind])) for kind in self._kinds]
        sources = [table for pair in pairs for table in pair]
        if len(sources) != len(self._sources) or any(a is not b for a, b in zip(sources, self._sources)):
            self._sources = sources
            self._angles = Angles(*(_stacked(tables) for tables in zip(*pairs, strict=True)))
        return self._angles


def _stacked(tables: Sequence[torch.Tensor]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[kinds, positions, dim]; a view where there is one kind."""
    return (tables[0][None] if len(tables) == 1 else torch.stack(list(tables))).numpy()


def step_of(parts: Parts, attention: object) -> Callable[[StepBatch], torch.Tensor] | None:
    """The compiled step that fits a model of these parts over such pages, else None."""
    if not isinstance(attention, CpuPagedAttention):
        return None
    if isinstance(parts.head.weight_tiles, FloatWeight):
        return LlamaStep(parts, attention) if _is_plain(parts, attention) else None
    from helix_gateway.runtime.cpu.quantised_llama import QuantisedLlamaStep, is_quantised_alike

    return QuantisedLlamaStep(parts, attention) if is_quantised_alike(parts) else None


def _is_plain(parts: Parts, attention: CpuPagedAttention) -> bool:
    """Whether there is nothing in a model that `layers.py` does not compute."""
    norms = [weight is not None for weight in parts.layers[0].norms]
    return parts.structure.is_plain and attention.is_uniform and all(norms[:2]) and not any(norms[2:])


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
