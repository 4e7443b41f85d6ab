"""A model as one start writes it down for the next: which stored tensors its parts are made of, and its few numbers.

A start that reads its parts so needs neither transformers nor a module of the model; whether they compute what they did,
the runner finds out (`compiled_runner.py`).  Writing it down takes the modules (`describing.py`).  Knows nothing about
pages.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec
import torch
from torch import nn

from helix_gateway.runtime.checkpoints.protocol import Checkpoint, StoredTensor
from helix_gateway.runtime.cpu.linear import PackedEmbedding, PackedLinear, fits_in_place, pack_weight
from helix_gateway.runtime.cpu.packed import PackedWeight
from helix_gateway.runtime.cpu.parts import LayerNorms, LayerParts, Parts, Structure
from helix_gateway.runtime.cpu.reading import MatrixQuantisation, Quantisation, of_tables, read_quantised
from helix_gateway.runtime.groups import LayerUse
from helix_gateway.runtime.loading import DTYPES
from helix_gateway.runtime.progress import Report
from helix_gateway.runtime.remembered import Remembered
from helix_gateway.runtime.rotary import Frequencies, FrequencyEmbedding, RotaryTable

_REMEMBERED_AS = "description"


class Form(msgspec.Struct, frozen=True):
    """What a model's weights are held in."""

    dtype: Literal["float32", "bfloat16"]
    """Of what is not quantised, and of what is computed."""
    quantisation: Quantisation | None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same for torch."""
        return DTYPES[self.dtype]


class NormSource(msgspec.Struct, frozen=True):
    """A norm."""

    name: str
    adds_one: bool
    """Whether its weight is what is added to one."""


class LayerSource(msgspec.Struct, frozen=True):
    """A layer: names of its modules, in the order of `LayerParts`."""

    products: list[list[str]]
    norms: list[NormSource | None]


class Description(msgspec.Struct, frozen=True):
    """A model; modules are named as transformers names them."""

    form: Form
    structure: Structure
    embedding: str
    head: str | None
    """None: it is the embedding's matrix."""
    layers: list[LayerSource]
    norm: NormSource
    frequencies: dict[str, Frequencies]
    """By what layers tell the rotary embedding."""
    uses: list[LayerUse]
    """Of keys and values, by each layer."""
    vocab_size: int
    context_length: int

    def modules(self) -> Iterator[str]:
        """All modules that hold tensors."""
        yield from [self.embedding, *filter(None, [self.head]), self.norm.name]
        for layer in self.layers:
            yield from (name for together in layer.products for name in together)
            yield from (norm.name for norm in layer.norms if norm is not None)


def remember(description: Description, remembered: Remembered) -> None:
    """Write it down for the next start."""
    remembered.put(_REMEMBERED_AS, msgspec.to_builtins(description))


def forget(remembered: Remembered) -> None:
    """Let the next start find none."""
    remembered.forget(_REMEMBERED_AS)


def recall(remembered: Remembered) -> Description | None:
    """What an earlier start has written down.

    Raises:
        msgspec.ValidationError: it is no description.
    """
    known = remembered.get(_REMEMBERED_AS)
    return None if known is None else msgspec.convert(known, Description)


def described_tensors(description: Description, checkpoint: Checkpoint) -> Mapping[str, StoredTensor]:
    """The stored tensors of a described model, by their parameters' names.

    Raises:
        ModelLoadError: the file is damaged, or holds more than the model.
    """
    names = [f"{module}.{kind}" for module in description.modules() for kind in ("weight", "bias")]
    return checkpoint.tensors(lambda: names)


def read_parts(description: Description, tensors: Mapping[str, StoredTensor], report: Report) -> Parts:
    """Read a model's parts, one matrix after the other.

    Raises:
        KeyError: a tensor is missing.
        ModelLoadError: one cannot be read.
    """
    reader = _Reader(description.form, tensors, report)
    layers = [
        LayerParts(
            tuple(tuple(reader.linear(name) for name in together) for together in layer.products),
            LayerNorms(*(None if norm is None else reader.norm(norm) for norm in layer.norms)),
        )
        for layer in description.layers
    ]
    embedding, head = reader.tables(description.embedding, description.head)
    rotary = RotaryTable(FrequencyEmbedding(description.frequencies), description.context_length)
    return Parts(description.structure, embedding, layers, reader.norm(description.norm), head, rotary)


class _Reader:
    """Reads tensors in the form that a model has, and tells how far it is."""

    def __init__(self, form: Form, tensors: Mapping[str, StoredTensor], report: Report) -> None:
        self._form, self._tensors, self._report = form, tensors, report
        self._done_bytes = 0

    def linear(self, name: str) -> PackedLinear:
        return PackedLinear(self._matrix(name, self._form.quantisation), self._bias(name))

    def tables(self, embedding: str, head: str | None) -> tuple[nn.Module, PackedLinear]:
        """Embedding and head, which is the embedding's matrix where it has no name."""
        if head is None:
            both = PackedEmbedding(self._table(embedding))
            return both, PackedLinear(both.weight_tiles, None)
        return self._embedding(embedding), PackedLinear(self._table(head), self._bias(head))

    def _embedding(self, name: str) -> nn.Module:
        if self._form.quantisation is not None:
            return PackedEmbedding(self._table(name))
        values = self._values(name)
        return nn.Embedding(values.shape[0], values.shape[1], _weight=values, _freeze=True)

    def norm(self, source: NormSource) -> torch.Tensor:
        values = self._values(source.name).float()
        return 1.0 + values if source.adds_one else values

    def _bias(self, name: str) -> torch.Tensor | None:
        stored = self._tensors.get(f"{name}.bias")
        return None if stored is None else stored.read(self._form.torch_dtype)

    def _values(self, name: str) -> torch.Tensor:
        return self._counted(name).read(self._form.torch_dtype)

    def _table(self, name: str) -> PackedWeight:
        layers = self._form.quantisation
        return self._matrix(name, None if layers is None else of_tables(layers))

    def _matrix(self, name: str, quantisation: MatrixQuantisation | None) -> PackedWeight:
        stored = self._counted(name)
        if quantisation is not None:
            return read_quantised(stored, quantisation)
        values = stored.read(self._form.torch_dtype)
        return pack_weight(values, in_place=fits_in_place(values))

    def _counted(self, name: str) -> StoredTensor:
        stored = self._tensors[f"{name}.weight"]
        self._done_bytes += stored.nbytes
        self._report(self._done_bytes)
        return stored
