"""What loading asks of a model's files, whatever their format."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


BlockKind: TypeAlias = Literal["Q4_0", "Q4_1", "Q8_0"]


class Blocks(NamedTuple):
    """A matrix in blocks of 32 inputs, as GGUF stores it."""

    kind: BlockKind
    numbers: npt.NDArray[np.uint8]
    """[rows, blocks of a row, bytes of a block]"""


Parameters: TypeAlias = Callable[[], Iterable[str]]
"""Finds out how transformers names a model's parameters, which takes the model."""


class StoredSize(Protocol):
    """What tells how much memory a tensor in a file will take."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In row-major order."""

    @property
    def block_kind(self) -> BlockKind | None:
        """Of the blocks that are computed with as they are; None where it is stored in another way."""


class StoredTensor(Protocol):
    """A tensor in a file; several threads may read at once."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In row-major order."""

    def blocks(self) -> Blocks | None:
        """A copy of its blocks, of a kind that is computed with as it is; None where it is stored in another way."""

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

    def sizes(self) -> Mapping[str, StoredSize]:
        """Return what is stored of weights, by the names that the file has for them."""

    def tensors(self, parameters: Parameters) -> Mapping[str, StoredTensor]:
        """Return the stored tensors by the names that transformers (or an older release of it) gives them.

        Args:
            parameters: the names of the model's, should it be of interest.
        """
