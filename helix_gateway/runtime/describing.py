"""Writes down what a model has turned out to be (`description.py`), where what its parts are made of can be named.

Knows transformers' modules; not how the next start reads them.
"""

from typing import Any

from torch import nn

from helix_gateway.runtime.checkpoints.protocol import Checkpoint
from helix_gateway.runtime.cpu.linear import PackedEmbedding, PackedLinear
from helix_gateway.runtime.cpu.parts import Parts
from helix_gateway.runtime.cpu.structures import adds_one, norms_of, products_of
from helix_gateway.runtime.description import Description, Form, LayerSource, NormSource, described_tensors
from helix_gateway.runtime.rotary import frequencies_of
from helix_gateway.runtime.runner import TransformersRunner


def describe(runner: TransformersRunner, form: Form, checkpoint: Checkpoint) -> Description | None:
    """What a runner computes with; None where there is no compiled step of it, or the file names its weights otherwise.

    Args:
        runner: of the model as it was loaded.
        form: what its weights are held in.
        checkpoint: where they come from.
    """
    parts, model = runner.parts, runner.model
    base: Any = model.base_model
    if parts is None or not _are_of(form, model, parts):
        return None
    frequencies = frequencies_of(parts.rotary, set(parts.structure.rotary_kinds))
    if frequencies is None:
        return None
    names = {module: name for name, module in model.named_modules()}
    description = Description(
        form=form,
        structure=parts.structure,
        embedding=names[parts.embedding],
        head=None if parts.is_tied else names[parts.head],
        layers=[_layer(layer, names) for layer in base.layers],
        norm=_norm(base.norm, names),
        frequencies=frequencies,
        uses=list(runner.uses),
        vocab_size=runner.vocab_size,
        context_length=runner.context_length,
    )
    return description if _is_all_there(description, model, checkpoint) else None


def _are_of(form: Form, model: Any, parts: Parts) -> bool:
    """Whether nothing is kept in another dtype, and tables are packed where the form says so."""
    base = model.base_model
    norms = [base.norm, *(norm for layer in base.layers for norm in norms_of(layer) if norm)]
    is_packed = isinstance(parts.embedding, PackedEmbedding)
    return all(norm.weight.dtype == form.torch_dtype for norm in norms) and is_packed >= (form.quantisation is not None)


def _layer(layer: Any, names: dict[nn.Module, str]) -> LayerSource:
    return LayerSource(
        [[names[part] for part in together] for together in products_of(layer)],
        [None if norm is None else _norm(norm, names) for norm in norms_of(layer)],
    )


def _norm(norm: nn.Module, names: dict[nn.Module, str]) -> NormSource:
    return NormSource(names[norm], adds_one(norm))


def _is_all_there(description: Description, model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether every weight, and every bias, lies in the file under the name that the model has for it."""
    stored = described_tensors(description, checkpoint)
    modules = dict(model.named_modules())
    return all(
        f"{name}.weight" in stored and (f"{name}.bias" in stored or not _has_bias(modules[name]))
        for name in description.modules()
    )


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear) and bool(module.bias_values.any())
