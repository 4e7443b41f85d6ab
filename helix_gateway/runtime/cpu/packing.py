"""Puts packed linear layers and embeddings (`linear.py`) in the place of a transformers model's own.

Knows which modules hold a matrix, and which of them hold the same; nothing about how a packed one multiplies.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain
from typing import TypeAlias, TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helix_gateway.runtime.cpu.linear import FORMATS, PackedEmbedding, PackedLinear, fits_in_place, pack_weight
from helix_gateway.runtime.cpu.packed import PackedWeight


def pack_linears(model: nn.Module) -> None:
    """Replace every ``nn.Linear`` and Conv1D inside a model, and the embeddings tied to them, by packed ones.

    A matrix of whole tiles that nothing else in the model uses is packed into its own memory; any other is copied and
    freed at once, also where somebody else still holds its module.  So the most memory in use is that of the weights
    and one odd matrix, and whoever shares weights with the model must copy them before.  Subclasses are left alone,
    since their forward may be another; so is a matrix that only embeddings use.

    Raises:
        TypeError: a weight is neither float32 nor bfloat16; the message names its module.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    uses = _uses_of_memory(model)
    for holders in matrices(model):
        replacements.update(stand_ins(holders, _packed_matrix(holders, uses)))
    replace_modules(model, replacements)


Holder: TypeAlias = nn.Linear | Conv1D | nn.Embedding
"""A module that holds a matrix which can be packed."""


def is_holder(module: object) -> TypeGuard[Holder]:
    """Whether it is one; subclasses are not, since their forward may be another, but for Gemma's scaled embeddings."""
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and (type(module) is nn.Embedding or _scales_rows(type(module).forward))
    return type(module) in (nn.Linear, Conv1D)


@cache
def _scales_rows(forward: Callable[..., torch.Tensor]) -> bool:
    """Whether an embedding's forward is what Gemma's is: rows times ``embed_scale``."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return inspect.getsource(forward) == inspect.getsource(Gemma3TextScaledWordEmbedding.forward)


def matrices(model: nn.Module) -> list[list[Holder]]:
    """The modules that hold each matrix of a linear layer, tied ones together.

    Raises:
        TypeError: a matrix is neither float32 nor bfloat16; the message names its module.
    """
    holders: dict[tuple[int, bool], list[Holder]] = {}
    for name, module in model.named_modules():
        if is_holder(module):
            if module.weight.dtype not in FORMATS and not isinstance(module, nn.Embedding):
                raise TypeError(
                    f"{name}: compiled products take float32 or bfloat16 weights, not {module.weight.dtype}"
                )
            holders.setdefault((id(module.weight), type(module) is Conv1D), []).append(module)
    return [group for group in holders.values() if any(not isinstance(module, nn.Embedding) for module in group)]


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, wherever they are in a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def _uses_of_memory(model: nn.Module) -> Counter[int]:
    """How many parameters and buffers of a model's modules lie in each piece of memory, by its address."""
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return Counter(tensor.untyped_storage().data_ptr() for _, tensor in tensors)


def _packed_matrix(holders: list[Holder], uses: Counter[int]) -> PackedWeight:
    parameter = holders[0].weight.detach()
    matrix = parameter.T if type(holders[0]) is Conv1D else parameter
    return pack_weight(matrix, in_place=_is_theirs_alone(matrix, len(holders), uses))


def stand_ins(holders: list[Holder], weight: PackedWeight) -> dict[nn.Module, nn.Module]:
    """Take the one matrix of some modules from them, and return what stands in place of each, once it is packed."""
    packed: dict[nn.Module, nn.Module] = {}
    for module in holders:
        if isinstance(module, nn.Embedding):
            packed[module] = PackedEmbedding(weight, float(getattr(module, "embed_scale", 1.0)))
        else:
            bias: torch.Tensor | None = module.bias
            packed[module] = PackedLinear(weight, bias)
        module.register_parameter("weight", None)
    return packed


def _is_theirs_alone(matrix: torch.Tensor, num_holders: int, uses: Counter[int]) -> bool:
    """Whether a matrix may be overwritten by its tiles: they fit, and nobody else reads it."""
    return fits_in_place(matrix) and uses[matrix.untyped_storage().data_ptr()] == num_holders
