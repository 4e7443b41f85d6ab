"""Puts quantised matrices in the place of a model's linear layers, their embeddings and its input embedding.

Each matrix is read from the file when its turn comes, so that no more than the quantised weights and one matrix are ever
in memory.  A GGUF's blocks are taken as they are where that is asked for and can be done.  What an output embedding or a table of
tokens is made of gets eight bits also where layers get four: it is read a row at a time, or decides between tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helix_gateway.runtime.cpu.linear import PackedEmbedding, PackedLinear, pack_weight
from helix_gateway.runtime.cpu.packed import PackedWeight
from helix_gateway.runtime.cpu.packing import Holder, is_holder, matrices, replace_modules, stand_ins
from helix_gateway.runtime.cpu.quantised_weights import QuantisedWeight
from helix_gateway.runtime.cpu.reading import MatrixQuantisation, Quantisation, of_tables, quantised, read_quantised
from helix_gateway.runtime.promises import Promises


def quantise_model(model: Any, quantisation: Quantisation, promises: Promises) -> None:
    """Quantise a model's matrices in place; its other parameters stay, and must be float32.

    Args:
        model: a transformers ``ForCausalLM`` in float32.
        quantisation: how.
        promises: the matrices that have not been read yet.

    Raises:
        ModelLoadError: a matrix cannot be read.
    """
    tables = of_tables(quantisation)
    _quantise(
        model, _all_matrices(model), promises, lambda holders: tables if is_table(holders, model) else quantisation
    )
    promises.fulfil(model)


def quantise_some(model: Any, wanted: Callable[[list[Holder]], bool], promises: Promises) -> None:
    """Quantise to int8 in groups what the wanted matrices are, by the modules that hold each; all others stay."""
    groups = [holders for holders in _all_matrices(model) if wanted(holders)]
    _quantise(model, groups, promises, lambda _: "grouped_int8")


def _all_matrices(model: Any) -> list[list[Holder]]:
    tokens = model.get_input_embeddings()
    groups = matrices(model)
    if is_holder(tokens) and not any(tokens in holders for holders in groups):
        groups.append([tokens])
    return groups


def _quantise(
    model: Any,
    groups: list[list[Holder]],
    promises: Promises,
    quantisation_of: Callable[[list[Holder]], MatrixQuantisation],
) -> None:
    replacements: dict[nn.Module, nn.Module] = {}
    for holders in groups:
        weight = _quantised(holders, quantisation_of(holders), promises)
        replacements.update(stand_ins(holders, weight))
    replace_modules(model, replacements)


def is_table(holders: list[Holder], model: Any) -> bool:
    """Whether a matrix, of the modules that hold it, is an output embedding or a table of tokens."""
    head = model.get_output_embeddings()
    return any(module is head or isinstance(module, nn.Embedding) for module in holders)


def _quantised(holders: list[Holder], quantisation: MatrixQuantisation, promises: Promises) -> QuantisedWeight:
    parameter = holders[0].weight.detach()
    stored, is_turned = promises.stored(parameter), type(holders[0]) is Conv1D
    if stored is not None and not is_turned:
        return read_quantised(stored, quantisation)
    matrix = parameter if stored is None else stored.read(None)
    return quantised(matrix.T if is_turned else matrix, quantisation)


class _Exact(PackedWeight):
    """The same matrix, its products in float32: unpacked at each use, so slow, and no more than one at a time."""

    dtype = torch.float32

    def __init__(self, weight: PackedWeight) -> None:
        self._weight = weight
        self.channels, self.inputs, self.tiles = weight.channels, weight.inputs, weight.tiles

    def unpacked(self) -> torch.Tensor:
        return self._weight.unpacked()

    def multiply(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.unpacked(), bias[: self.channels])

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return self._weight.gather(ids)


def _packed_modules(model: nn.Module) -> list[PackedLinear | PackedEmbedding]:
    return [module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]


def is_quantised(model: nn.Module) -> bool:
    """Whether any of a model's matrices is."""
    return any(isinstance(module.weight_tiles, QuantisedWeight) for module in _packed_modules(model))


@contextmanager
def computing_exactly(model: nn.Module) -> Iterator[None]:
    """Within it a quantised model's modules round no activations: what is left is the float32 model of its weights."""
    modules = _packed_modules(model)
    weights = [module.weight_tiles for module in modules]
    try:
        for module, weight in zip(modules, weights, strict=True):
            module.weight_tiles = _Exact(weight)
        yield
    finally:
        for module, weight in zip(modules, weights, strict=True):
            module.weight_tiles = weight


def dequantise(model: nn.Module) -> None:
    """Give a quantised model float32 matrices of the same numbers, for good: four times the memory."""
    packed: dict[PackedWeight, PackedWeight] = {}
    for module in _packed_modules(model):
        weight = module.weight_tiles
        if isinstance(weight, QuantisedWeight):
            if weight not in packed:
                packed[weight] = pack_weight(weight.unpacked())
            module.weight_tiles = packed[weight]
