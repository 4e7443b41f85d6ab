"""A model as a folder in Hugging Face layout: config.json and safetensors.

Weights stored as pickles are refused, as are quantised ones.  Knows nothing about how weights get into the model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.checkpoints.layout import CONFIG, read_json, weight_files
from helix_gateway.runtime.checkpoints.protocol import Parameters
from helix_gateway.runtime.checkpoints.safetensors_file import SafetensorsTensor, read_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class FolderCheckpoint:
    """One folder; see `Checkpoint`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._content = read_json(folder / CONFIG)
        quantisation = self._content.get("quantization_config")
        if quantisation:
            raise ModelLoadError(
                f"{folder} is quantised ({quantisation.get('quant_method', 'by an unknown method')}), which Helix does "
                f"not load; use the model's original weights, or a GGUF of it."
            )

    def config(self) -> "PreTrainedConfig":
        """Return transformers' configuration; code that comes with a model is not run."""
        from transformers import AutoConfig

        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            kind = self._content.get("model_type", "unknown")
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelLoadError(
                f"{self.folder} is a model of type {kind!r}, and transformers does not accept its configuration: {reason}"
            ) from error
        return config

    def bfloat16_share(self) -> float:
        """Return the share of bfloat16 in the weights' bytes."""
        tensors = self._read().values()
        total_bytes = sum(tensor.nbytes for tensor in tensors)
        return sum(tensor.nbytes for tensor in tensors if tensor.dtype == torch.bfloat16) / max(1, total_bytes)

    def sizes(self) -> Mapping[str, SafetensorsTensor]:
        """Return the tensors of all shards."""
        return self._read()

    def tensors(self, parameters: Parameters) -> Mapping[str, SafetensorsTensor]:
        """Return the tensors of all shards, named as they are stored; transformers knows older names."""
        return self._read()

    def _read(self) -> dict[str, SafetensorsTensor]:
        tensors: dict[str, SafetensorsTensor] = {}
        for file in weight_files(self.folder):
            tensors |= read_safetensors(file)
        return tensors
