"""Tensors of a GGUF file as transformers' modules want them: dequantised, and in the order of the original model.

llama.cpp stores some tensors changed: the rows of Llama's query and key projections are put in the order of its
rotary kernel (pairs that are rotated together lie side by side, where transformers has the two halves of a head
apart), and Gemma's norms have the 1 added that the model adds itself.  Both are undone here.
Knows nothing about configurations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import gguf
import numpy as np
import torch

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.checkpoints.gguf_file import GGUFFile, TensorInfo
from helix_gateway.runtime.checkpoints.protocol import BlockKind, Blocks

Restore: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Undoes, in float32, what the converter did to a tensor; where it moves the rows of a matrix, in any dtype."""

_BLOCK_KINDS: dict[gguf.GGMLQuantizationType, BlockKind] = {
    gguf.GGMLQuantizationType.Q4_0: "Q4_0",
    gguf.GGMLQuantizationType.Q4_1: "Q4_1",
    gguf.GGMLQuantizationType.Q8_0: "Q8_0",
}

# Dequantising makes several temporaries of its input's size: small pieces stay in the cache and bound the peak.
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One parameter; see `StoredTensor`."""

    file: GGUFFile
    info: TensorInfo
    restore: Restore | None = None
    """None where the converter stored it as it was."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.info.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """In row-major order."""
        return self.info.shape

    @property
    def block_kind(self) -> BlockKind | None:
        """See `StoredSize`."""
        return _BLOCK_KINDS.get(self.info.type) if len(self.info.shape) == 2 else None

    def blocks(self) -> Blocks | None:
        """See `StoredTensor`; what is restored of a matrix is the order of its rows."""
        kind = self.block_kind
        if kind is None:
            return None
        rows = torch.from_numpy(np.array(self.file.rows(self.info)))
        rows = rows if self.restore is None else self.restore(rows)
        size = gguf.GGML_QUANT_SIZES[self.info.type][1]
        return Blocks(kind, rows.contiguous().view(len(rows), -1, size).numpy())

    def read(self, dtype: torch.dtype | None) -> torch.Tensor:
        """Dequantise it into memory of its own.

        Raises:
            ModelLoadError: its type cannot be dequantised.
        """
        if self.restore is None:
            return read_tensor(self.file, self.info, dtype or torch.float32)
        return self.restore(read_tensor(self.file, self.info, torch.float32)).to(dtype or torch.float32)


def read_tensor(file: GGUFFile, info: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor's values, of its own shape.

    Raises:
        ModelLoadError: its type cannot be dequantised.
    """
    rows = file.rows(info)
    values = torch.empty((len(rows), info.shape[-1]), dtype=dtype)
    num_rows = max(1, _PIECE_BYTES // rows.shape[1])
    try:
        for start in range(0, len(rows), num_rows):
            piece = np.array(rows[start : start + num_rows])
            values[start : start + num_rows] = torch.from_numpy(gguf.quants.dequantize(piece, info.type))
    except NotImplementedError as error:
        raise ModelLoadError(f"{file.path} has tensors of type {info.type.name}, which cannot be read.") from error
    return values.reshape(info.shape)


def unpermute(num_heads: int) -> Restore:
    """The `Restore` of a projection [num_heads × head_dim, ...] whose rows are in the order of rotated pairs."""

    def restore(values: torch.Tensor) -> torch.Tensor:
        half = values.shape[0] // num_heads // 2
        pairs = values.reshape(num_heads, half, 2, math.prod(values.shape[1:]))
        return pairs.transpose(1, 2).reshape(values.shape)

    return restore


def unshift(values: torch.Tensor) -> torch.Tensor:
    """The `Restore` of a norm's weight that had 1 added."""
    return values - 1.0
