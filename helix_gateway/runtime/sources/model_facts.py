"""What a model is, told from its headers and configuration alone: no weights are read, neither torch nor transformers
is imported, and nothing is said about whether Helix can serve it.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.checkpoints import layout

_LENGTH_BYTES = 8
_LONGEST_HEADER_BYTES = 100_000_000
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
# A scale for every so many weights, or a bias, does not say what a model's weights are.
_SIDE_TYPES = frozenset({"I64", "I32", "BOOL"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model as its files describe it; None where they do not tell."""

    format: Literal["GGUF", "safetensors"]
    weights: str | None
    """The type in which most bytes of its weights are: ``Q4_1``, ``BF16``; or how it was quantised."""
    architecture: str | None
    context_tokens: int | None
    parameters: int | None
    """Weights, tied ones once; None where they are packed so that their number is not seen."""
    size_bytes: int
    """Of the weights' files."""


def read_facts(path: Path) -> ModelFacts:
    """The facts of a GGUF file or of a folder in Hugging Face layout.

    Raises:
        ModelLoadError: it is neither, is damaged, or lacks some of its files.
    """
    return _facts_of_folder(path) if path.is_dir() else _facts_of_gguf(path)


def _facts_of_gguf(path: Path) -> ModelFacts:
    from helix_gateway.runtime.checkpoints.gguf_file import GGUFFile

    file = GGUFFile(path)
    bytes_by_type: Counter[str] = Counter()
    for tensor in file.tensors.values():
        bytes_by_type[tensor.type.name] += tensor.nbytes
    architecture = file.get("general.architecture")
    context = file.get(f"{architecture}.context_length")
    return ModelFacts(
        format="GGUF",
        weights=_most(bytes_by_type),
        architecture=None if architecture is None else str(architecture),
        context_tokens=None if context is None else int(context),
        parameters=sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        size_bytes=path.stat().st_size,
    )


def _facts_of_folder(folder: Path) -> ModelFacts:
    files = layout.weight_files(folder)
    config = layout.read_json(folder / layout.CONFIG)
    text = config.get("text_config") or config
    bytes_by_type: Counter[str] = Counter()
    parameters = 0
    for file in files:
        for kind, shape, size_bytes in _tensors_of(file):
            bytes_by_type[kind] += size_bytes
            parameters += math.prod(shape)
    quantised = (config.get("quantization_config") or {}).get("quant_method")
    return ModelFacts(
        format="safetensors",
        weights=quantised or _most(bytes_by_type),
        architecture=next(iter(config.get("architectures") or [config.get("model_type")]), None),
        context_tokens=next((int(text[key]) for key in _CONTEXT_KEYS if text.get(key)), None),
        parameters=None if quantised else parameters,
        size_bytes=sum(file.stat().st_size for file in files),
    )


def _most(bytes_by_type: "Counter[str]") -> str | None:
    weights = {kind: size for kind, size in bytes_by_type.items() if kind not in _SIDE_TYPES}
    return max(weights, key=weights.__getitem__, default=None)


def _tensors_of(file: Path) -> Iterator[tuple[str, list[int], int]]:
    """Type, shape and bytes of each tensor of a safetensors file, from its header."""
    try:
        with file.open("rb") as source:
            length = int.from_bytes(source.read(_LENGTH_BYTES), "little")
            if length > _LONGEST_HEADER_BYTES:
                raise ValueError("its header has no sane length")
            header: dict[str, Any] = json.loads(source.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield entry["dtype"], entry["shape"], end - begin
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{file} is no whole safetensors file: {error}. Download it again.") from error
