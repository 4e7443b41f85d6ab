"""A model as one GGUF file: its weights under the names that transformers gives its parameters.

Names are matched by the `gguf` library's own table, from each parameter of the model to the tensor that holds it.
Knows nothing about how weights get into the model.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.checkpoints.gguf_config import Metadata, describe_config
from helix_gateway.runtime.checkpoints.gguf_file import GGUFFile
from helix_gateway.runtime.checkpoints.gguf_tensors import GGUFTensor, Restore, unpermute, unshift
from helix_gateway.runtime.checkpoints.protocol import Parameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NOT_PARAMETERS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_SHIFTED_NORMS = ("gemma2", "gemma3")
_SHOWN = 3


class GGUFCheckpoint:
    """One file; see `Checkpoint`."""

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self._described = describe_config(self._file)

    def config(self) -> "PreTrainedConfig":
        """Return the configuration that the metadata describes."""
        return self._described.config()

    def bfloat16_share(self) -> float:
        """Return the share of bfloat16 in the weights' bytes."""
        infos = self._file.tensors.values()
        total_bytes = sum(info.nbytes for info in infos)
        kind = gguf.GGMLQuantizationType.BF16
        return sum(info.nbytes for info in infos if info.type == kind) / max(1, total_bytes)

    def sizes(self) -> Mapping[str, GGUFTensor]:
        """Return all tensors but those of the rotary embedding."""
        return {
            name: GGUFTensor(self._file, info)
            for name, info in self._file.tensors.items()
            if name not in _NOT_PARAMETERS
        }

    def tensors(self, parameters: Parameters) -> Mapping[str, GGUFTensor]:
        """Return what the file holds for each parameter of the model, dequantised when read.

        Raises:
            ModelLoadError: the file holds tensors that the model has no parameter for.
        """
        return _weights(self._file, self._described.fields, parameters())


def _weights(file: GGUFFile, config: Mapping[str, Any], parameters: Iterable[str]) -> dict[str, GGUFTensor]:
    architecture = Metadata(file).architecture
    names = _tensor_names(architecture, config["num_hidden_layers"], parameters)
    found = {parameter: file.tensors[name] for parameter, name in names.items() if name in file.tensors}
    _refuse_unknown(file, {info.name for info in found.values()})
    return {
        parameter: GGUFTensor(file, info, _restorer(architecture, parameter, config))
        for parameter, info in found.items()
    }


def _tensor_names(architecture: str, num_layers: int, parameters: Iterable[str]) -> dict[str, str]:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], num_layers)
    pairs = ((name, table.get_name(name, try_suffixes=(".weight", ".bias"))) for name in parameters)
    return {parameter: name for parameter, name in pairs if name is not None}


def _refuse_unknown(file: GGUFFile, used: set[str]) -> None:
    unknown = sorted(file.tensors.keys() - used - set(_NOT_PARAMETERS))
    if unknown:
        shown = ", ".join(unknown[:_SHOWN])
        raise ModelLoadError(f"{file.path} holds {len(unknown)} tensors that its architecture has no use for: {shown}.")


def _restorer(architecture: str, parameter: str, config: Mapping[str, Any]) -> Restore | None:
    if architecture == "llama" and ".q_proj." in parameter:
        return unpermute(config["num_attention_heads"])
    if architecture == "llama" and ".k_proj." in parameter:
        return unpermute(config["num_key_value_heads"])
    if architecture in _SHIFTED_NORMS and parameter.endswith("norm.weight"):
        return unshift
    return None
