"""Tensors of a GGUF file as transformers' modules want them: dequantised, and in the order of the original model.

llama.cpp stores some tensors changed: the rows of Llama's query and key projections are put in the order of its
rotary kernel (pairs that are rotated together lie side by side, where transformers has the two halves of a head
apart), and Gemma's norms have the 1 added that the model adds itself.  Both are undone here.
Knows nothing about configurations.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import gguf
import numpy as np
import numpy.typing as npt

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.checkpoints.gguf_file import GGUFFile, TensorInfo

Float32s: TypeAlias = npt.NDArray[np.float32]
Restore: TypeAlias = Callable[[Float32s], Float32s]
"""Undoes what the converter did to a tensor."""

# Dequantising makes several temporaries of its input's size: small pieces stay in the cache and bound the peak.
_PIECE_BYTES = 1 << 20


def read_array(file: GGUFFile, info: TensorInfo) -> Float32s:
    """Return a tensor's values, of its own shape.

    Raises:
        ModelLoadError: its type cannot be dequantised.
    """
    rows = file.rows(info)
    values = np.empty((len(rows), info.shape[-1]), np.float32)
    step = max(1, _PIECE_BYTES // rows.shape[1])
    try:
        for start in range(0, len(rows), step):
            piece = np.ascontiguousarray(rows[start : start + step])
            values[start : start + step] = gguf.quants.dequantize(piece, info.type)
    except NotImplementedError as error:
        raise ModelLoadError(f"{file.path} has tensors of type {info.type.name}, which cannot be read.") from error
    return values.reshape(info.shape)


def unchanged(values: Float32s) -> Float32s:
    """The `Restore` of a tensor that is stored as it was."""
    return values


def unpermute(num_heads: int) -> Restore:
    """The `Restore` of a projection [num_heads × head_dim, ...] whose rows are in the order of rotated pairs."""

    def restore(values: Float32s) -> Float32s:
        half = values.shape[0] // num_heads // 2
        pairs = values.reshape(num_heads, half, 2, math.prod(values.shape[1:]))
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)

    return restore


def unshift(values: Float32s) -> Float32s:
    """The `Restore` of a norm's weight that had 1 added."""
    values -= 1.0
    return values
