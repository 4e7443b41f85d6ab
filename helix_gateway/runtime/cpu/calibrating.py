"""Linear layers that round their own matrix to four bits when their first inputs come, and answer with what it has become.

So one forward of a float model over some text rounds it from its first layer to its last, each matrix for inputs that have
passed all the rounded ones before it, and no more of its numbers are in memory than those of one layer.  What projects to
queries, keys and values gets eight bits, as tables of tokens do: it is a small part of a model, and values lose most.
Knows nothing about the text.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from helix_gateway.runtime.cpu.error_feedback import Moments, as_blocks, moments_of, round_with_feedback
from helix_gateway.runtime.cpu.packing import Holder, matrices, replace_modules
from helix_gateway.runtime.cpu.quantised_kernels import GROUP_INPUTS
from helix_gateway.runtime.cpu.quantised_weights import Int4Weight
from helix_gateway.runtime.cpu.quantising import is_table, quantise_some
from helix_gateway.runtime.cpu.structures import products_of
from helix_gateway.runtime.cpu.threads import configure_threads
from helix_gateway.runtime.promises import Promises

Rounded = dict[str, npt.NDArray[np.uint8]]
"""GGUF's Q4_1 blocks [channels, groups, 20] of matrices, by their parameters' names."""


class NotCalibratedError(Exception):
    """A model cannot be rounded for its inputs; it says why."""


def round_as_inputs_come(model: Any, promises: Promises) -> Rounded:
    """Put layers that round themselves in the place of a model's; what is returned fills as the model is computed.

    All else is read and quantised at once.

    Args:
        model: a transformers ``ForCausalLM`` in float32, of a family that has a compiled step (`structures.py`).
        promises: its matrices, which are read when their turn comes.

    Raises:
        NotCalibratedError: a matrix is none of a linear layer's own, or not of whole groups of inputs.
    """
    rounded: Rounded = {}
    names = {module: name for name, module in model.named_modules()}
    seen = _Seen()
    # All of what a step computes as one matrix.
    attended: set[Any] = {module for layer in model.base_model.layers for module in products_of(layer)[0]}

    def keeps_eight_bits(holders: list[Holder]) -> bool:
        return is_table(holders, model) or any(module in attended for module in holders)

    replacements: dict[nn.Module, nn.Module] = {}
    for holders in matrices(model):
        if not keeps_eight_bits(holders):
            linear = _sole_linear(holders)
            replacements[linear] = _RoundingLinear(linear, f"{names[linear]}.weight", promises, seen, rounded)
    replace_modules(model, replacements)
    quantise_some(model, keeps_eight_bits, promises)
    promises.fulfil(model)
    return rounded


def unrounded(model: nn.Module) -> int:
    """Of layers that were to round themselves, how many no input has reached."""
    return sum(isinstance(module, _RoundingLinear) and not module.is_rounded for module in model.modules())


def _sole_linear(holders: list[Holder]) -> nn.Linear:
    linear = holders[0]
    if len(holders) > 1 or type(linear) is not nn.Linear:
        raise NotCalibratedError(f"a matrix is that of {type(linear).__name__}, or of several layers")
    if linear.in_features % GROUP_INPUTS:
        raise NotCalibratedError(f"a layer has {linear.in_features} inputs, no multiple of {GROUP_INPUTS}")
    return linear


class _Seen:
    """The moments of the inputs that came last: those of a gate's projection are those of what it gates too."""

    def __init__(self) -> None:
        self._inputs: torch.Tensor | None = None
        self._moments: Moments | None = None

    def moments(self, inputs: torch.Tensor) -> Moments:
        if self._moments is None or self._inputs is not inputs:
            self._inputs, self._moments = inputs, moments_of(inputs.reshape(-1, inputs.shape[-1]))
        return self._moments


class _RoundingLinear(nn.Module):
    def __init__(self, linear: nn.Linear, name: str, promises: Promises, seen: _Seen, rounded: Rounded) -> None:
        super().__init__()
        self._name, self._promises, self._seen, self._rounded = name, promises, seen, rounded
        self._parameter, self._bias = linear.weight.detach(), linear.bias
        self._weight: Int4Weight | None = None

    @property
    def is_rounded(self) -> bool:
        return self._weight is not None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self._weight is None:
            self._weight = self._round(inputs)
        weight = self._weight
        rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
        return weight.multiply(rows, weight.padded_bias(self._bias)).view(*inputs.shape[:-1], weight.channels)

    def _round(self, inputs: torch.Tensor) -> Int4Weight:
        stored = self._promises.stored(self._parameter)
        matrix = self._parameter if stored is None else stored.read(torch.float32)
        found = round_with_feedback(configure_threads(), matrix.float().contiguous(), self._seen.moments(inputs))
        self._rounded[self._name] = as_blocks(found)
        return Int4Weight.from_blocks(self._rounded[self._name])
