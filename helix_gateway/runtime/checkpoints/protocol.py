"""What loading asks of a model's files, whatever their format."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from types import EllipsisType

    from transformers import PreTrainedConfig, PreTrainedModel


class StoredTensor(Protocol):
    """A tensor in a file, read when indexed with ``...``; several threads may do so at once."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""

    def __getitem__(self, index: "EllipsisType") -> torch.Tensor:
        """Read it into memory of its own, on the CPU, in whatever dtype it is stored or dequantised to."""


class Checkpoint(Protocol):
    """The files of one model; any method raises `ModelLoadError` where they are damaged or not served."""

    def config(self) -> "PreTrainedConfig":
        """Return transformers' configuration of the model."""

    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the ids of the tokens that end an answer, the most usual first."""

    def bfloat16_share(self) -> float:
        """Return how much of the weights, by bytes, is stored in bfloat16: 0 to 1."""

    def tensors(self, model_class: type["PreTrainedModel"]) -> Mapping[str, StoredTensor]:
        """Return the stored tensors by the names that transformers (or an older release of it) gives them."""
