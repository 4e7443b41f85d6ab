"""What a packed matrix is to the layers that use it (`linear.py`), whatever its numbers are stored as."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS


class PackedWeight(ABC):
    """A matrix [channels, inputs] as tiles of 32 channels, the tiles' first dimension.

    Not a module, so that ``model.to(dtype)`` cannot convert what is no longer a plain matrix.  A linear layer and an
    embedding that are tied share one.
    """

    dtype: ClassVar[torch.dtype]
    """Of activations."""
    channels: int
    inputs: int
    tiles: torch.Tensor
    """[ceil(channels / 32), ...]"""

    @abstractmethod
    def unpacked(self) -> torch.Tensor:
        """A copy as the plain matrix [channels, inputs], of `dtype`."""

    @abstractmethod
    def multiply(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + bias``: x [rows, inputs] and the result [rows, channels] of `dtype`, bias as `padded_bias`."""

    @abstractmethod
    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix: ids of any shape to [..., inputs].

        Raises:
            IndexError: an id is not a row's number.
        """

    def padded_bias(self, bias: torch.Tensor | None) -> torch.Tensor:
        """float32, as long as the tiles are wide; zeros where there is no bias."""
        padded = torch.zeros(len(self.tiles) * TILE_CHANNELS)
        if bias is not None:
            padded[: self.channels] = bias.detach()
        return padded
