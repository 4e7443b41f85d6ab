"""Finds the compiled step of a model, and runs a whole step of a Llama's float weights through `layers.py`.

Which models there are steps for, `structures.py` tells: in float those that have nothing which the first Llama lacks,
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
from helix_gateway.runtime.cpu.products import host_shape
from helix_gateway.runtime.cpu.structures import Structure, norm_weight, norms_of, products_of, structure_of
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
        model: a transformers ``ForCausalLM`` whose structure is plain; its layers' weights are joined in place.
        structure: of the model.
        attention: the runner's.
        rotary: the table that the model's rotary embedding has become.
    """

    def __init__(self, model: Any, structure: Structure, attention: CpuPagedAttention, rotary: RotaryTable) -> None:
        base = model.base_model
        self._attention = attention
        self._tables = AngleTables(rotary, structure.rotary_kinds)
        self._embedding: nn.Module = base.embed_tokens
        self._head: PackedLinear = model.get_output_embeddings()
        self._dtype: torch.dtype = self._head.weight_tiles.dtype
        self._norm = norm_weight(base.norm).numpy()
        self._eps = np.float32(structure.eps)
        self._kept: list[torch.Tensor] = []
        """Memory that the compiled step knows by address only."""
        layers = np.array([self._describe(layer) for layer in base.layers], np.int64)
        return_freed_blocks()
        first = base.layers[0]
        sizes = np.array(
            [[parts[0].in_features, sum(part.out_features for part in parts)] for parts in products_of(first)], np.int64
        )
        self._weights = Weights(layers, sizes, structure.scaling, self._eps)
        attention.link(self._dtype)
        self._run = compiled_layers(self._head.weight_tiles.bits, host_shape())

    def _describe(self, layer: Any) -> list[int]:
        fields = []
        for parts in products_of(layer):
            fields += [join_tiles(parts).data_ptr(), self._keep(torch.cat([part.bias_values for part in parts]))]
        fields += [self._keep(norm_weight(norm).contiguous()) for norm in norms_of(layer)[:2]]
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


def find_llama_step(
    model: Any, attention: object, rotary: Sequence[RotaryTable]
) -> Callable[[StepBatch], torch.Tensor] | None:
    """The compiled step of a model whose structure it fits, else None."""
    if not isinstance(attention, CpuPagedAttention) or len(rotary) != 1:
        return None
    structure = structure_of(model, rotary[0])
    if structure is None:
        return None
    if isinstance(model.get_output_embeddings().weight_tiles, FloatWeight):
        return LlamaStep(model, structure, attention, rotary[0]) if _is_plain(model, structure, attention) else None
    from helix_gateway.runtime.cpu.quantised_llama import QuantisedLlamaStep, is_quantised_alike

    return QuantisedLlamaStep(model, structure, attention, rotary[0]) if is_quantised_alike(model) else None


def _is_plain(model: Any, structure: Structure, attention: CpuPagedAttention) -> bool:
    """Whether there is nothing in a model that `layers.py` does not compute."""
    before, others = norms_of(model.base_model.layers[0])[:2], norms_of(model.base_model.layers[0])[2:]
    return structure.is_plain and attention.is_uniform and all(before) and not any(others)


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
