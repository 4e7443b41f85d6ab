"""What loading asks of a model's files, whatever their format."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class StoredTensor(Protocol):
    """A tensor in a file; several threads may read at once."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""

    def read(self, dtype: torch.dtype | None) -> torch.Tensor:
        """Read it into memory of its own, on the CPU.

        Args:
            dtype: what floating-point numbers shall be converted to, piece by piece, so that no second copy of the
                tensor is ever there; None: as they are stored, or as exactly as they dequantise.
        """


class Checkpoint(Protocol):
    """The files of one model; any method raises `ModelLoadError` where they are damaged or not served."""

    def config(self) -> "PreTrainedConfig":
        """Return transformers' configuration of the model."""

    def bfloat16_share(self) -> float:
        """Return how much of the weights, by bytes, is stored in bfloat16: 0 to 1."""

    def tensors(self, model_class: type["PreTrainedModel"]) -> Mapping[str, StoredTensor]:
        """Return the stored tensors by the names that transformers (or an older release of it) gives them."""
