"""Linear layers and tied embeddings over packed weights, for CPUs: ``y = x @ W.T + b``, each row as if it were alone.

Weights are packed once into tiles of 32 output channels, in the order in which the compiled product reads them.  A
row's bits depend on that row alone: not on the other rows, the threads or the processor's vectors.  Inference only, no
gradients.  Knows nothing about models beyond their modules, nor about batches or sequences.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from helix_gateway.runtime.cpu.emitter import LANES
from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS
from helix_gateway.runtime.cpu.packed import PackedWeight
from helix_gateway.runtime.cpu.products import gather_rows, host_shape, products, wide_elements
from helix_gateway.runtime.cpu.threads import configure_threads

# Multiply-adds below which a second thread does not pay: a parallel region costs 2 microseconds (measured), in which one
# core reads some 32 KB of weights.
_SERIAL_PRODUCT = 1 << 15
# Numbers packed at a time: enough to hide the cost of an operator, few enough to stay in the cache.
_PIECE_ELEMENTS = 1 << 18


class FloatWeight(PackedWeight):
    """A matrix [channels, inputs] as tiles [ceil(channels / 32), inputs, 32], zeros behind the last channel."""

    bits: ClassVar[int]

    def __init__(self, weight: torch.Tensor, *, in_place: bool = False) -> None:
        self.channels, self.inputs = weight.shape
        count, whole = -(-self.channels // TILE_CHANNELS), self.channels // TILE_CHANNELS
        if in_place:
            self.tiles = weight.view(count, self.inputs, TILE_CHANNELS)
        else:
            self.tiles = torch.zeros(count, self.inputs, TILE_CHANNELS, dtype=self.dtype)
        vectors, piece = self._vectors(self.tiles), max(1, _PIECE_ELEMENTS // (TILE_CHANNELS * self.inputs))
        for first in range(0, whole, piece):
            rows = weight[first * TILE_CHANNELS : min(first + piece, whole) * TILE_CHANNELS]
            # A tile lies where its channels lay, so no more than these are needed twice.
            rows = rows.clone() if in_place else rows
            vectors[first : min(first + piece, whole)] = rows.view(-1, 2, LANES, self.inputs)
        if whole < count:
            last = weight.new_zeros(TILE_CHANNELS, self.inputs)
            last[: self.channels % TILE_CHANNELS] = weight[whole * TILE_CHANNELS :]
            vectors[whole] = last.view(2, LANES, self.inputs)

    @staticmethod
    @abstractmethod
    def _vectors(tiles: torch.Tensor) -> torch.Tensor:
        """The same memory as [count, 2, 16, inputs]: a channel's vector and lane in its tile."""

    def unpacked(self) -> torch.Tensor:
        """A copy as the plain matrix [channels, inputs]."""
        return self._vectors(self.tiles).reshape(-1, self.inputs)[: self.channels]

    def multiply(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + bias``: x [rows, inputs] and the result [rows, channels] of `dtype`, bias as `padded_bias`."""
        rows, channels, inputs = x.shape[0], self.channels, self.inputs
        out = torch.empty(rows, channels, dtype=self.dtype)
        if rows == 0:
            return out
        if x.stride(1) != 1:
            x = x.contiguous()
        wide = self._scratch(rows)
        product, threads = products(self.bits, host_shape()), configure_threads()
        operands = (x.data_ptr(), x.stride(0), wide.data_ptr(), self.tiles.data_ptr(), inputs, bias.data_ptr())
        if threads == 1 or rows * inputs * channels < _SERIAL_PRODUCT:
            product.serial(rows, *operands, out.data_ptr(), channels)
        else:
            product.parallel(threads, rows, *operands, out.data_ptr(), channels)
        return out

    @abstractmethod
    def _scratch(self, rows: int) -> torch.Tensor:
        """Memory in which the product widens its activations."""

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix: ids of any shape to [..., inputs].

        Raises:
            IndexError: an id is not a row's number.
        """
        wanted = ids.reshape(-1).to(torch.int64)
        rows = torch.empty(len(wanted), self.inputs, dtype=self.dtype)
        if not gather_rows(_bits(self.tiles), self._lanes(), self.channels, wanted.numpy(), _bits(rows)):
            raise IndexError(f"ids must lie in 0 .. {self.channels - 1}")
        return rows.view(*ids.shape, self.inputs)

    def _lanes(self) -> npt.NDArray[np.int64]:
        """[32], the column of a tile in which each of its channels stands."""
        columns = torch.arange(TILE_CHANNELS).view(1, 1, TILE_CHANNELS)
        return self._vectors(columns).reshape(-1).numpy()


class Float32Weight(FloatWeight):
    """Channels in their order."""

    dtype, bits = torch.float32, 32

    @staticmethod
    def _vectors(tiles: torch.Tensor) -> torch.Tensor:
        return tiles.view(len(tiles), -1, 2, LANES).permute(0, 2, 3, 1)

    def _scratch(self, rows: int) -> torch.Tensor:
        return torch.empty(0)


class BFloat16Weight(FloatWeight):
    """Channels j and j + 16 side by side in one 32-bit word, which widens both in one operation each."""

    dtype, bits = torch.bfloat16, 16

    @staticmethod
    def _vectors(tiles: torch.Tensor) -> torch.Tensor:
        return tiles.view(len(tiles), -1, LANES, 2).permute(0, 3, 2, 1)

    def _scratch(self, rows: int) -> torch.Tensor:
        return torch.empty(wide_elements(rows, self.inputs))


FORMATS: dict[torch.dtype, type[FloatWeight]] = {kind.dtype: kind for kind in (Float32Weight, BFloat16Weight)}
"""Of each dtype that a matrix can be packed in."""


def pack_weight(weight: torch.Tensor, *, in_place: bool = False) -> FloatWeight:
    """Pack a matrix [channels, inputs] of a dtype that has a format.

    Args:
        weight: what is packed.
        in_place: into the matrix's own memory, which must be contiguous and of whole tiles.

    Raises:
        TypeError: it is neither float32 nor bfloat16.
    """
    if weight.dtype not in FORMATS:
        raise TypeError(f"compiled products take float32 or bfloat16 weights, not {weight.dtype}")
    return FORMATS[weight.dtype](weight.detach(), in_place=in_place)


def fits_in_place(matrix: torch.Tensor) -> bool:
    """Whether a matrix is of whole tiles, and alone in its memory."""
    is_whole = matrix.is_contiguous() and matrix.shape[0] % TILE_CHANNELS == 0
    return is_whole and matrix.untyped_storage().nbytes() == matrix.nbytes


def _bits(values: torch.Tensor) -> npt.NDArray[Any]:
    """The same memory as a numpy array; bfloat16, which numpy lacks, as its bits."""
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


class PackedLinear(nn.Module):
    """In place of ``nn.Linear`` or GPT-2's Conv1D: x [..., in_features] to a contiguous [..., out_features].

    Raises (in forward):
        ValueError: x has another last dimension.
        TypeError: x has another dtype than the weights.
    """

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight_tiles = weight
        self.in_features, self.out_features = weight.inputs, weight.channels
        self.bias_values = weight.padded_bias(bias)

    @classmethod
    def from_linear(cls, module: nn.Linear) -> "PackedLinear":
        """Pack a copy of the module's matrix."""
        return cls(pack_weight(module.weight), module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes x [..., in_features] to [..., out_features]."""
        weight = self.weight_tiles
        if x.shape[-1] != weight.inputs:
            raise ValueError(f"expected {weight.inputs} inputs in the last dimension, got {tuple(x.shape)}")
        if x.dtype is not weight.dtype:
            raise TypeError(f"expected {weight.dtype} activations, got {x.dtype}")
        if x.dim() == 2:
            return weight.multiply(x, self.bias_values)
        return weight.multiply(x.reshape(-1, weight.inputs), self.bias_values).view(*x.shape[:-1], weight.channels)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.weight_tiles.dtype}"


class PackedEmbedding(nn.Module):
    """In place of an ``nn.Embedding`` that shares its matrix with a linear layer: ids [...] to rows [..., features].

    Raises (in forward):
        IndexError: an id is not a row's number.
    """

    def __init__(self, weight: PackedWeight, factor: float = 1.0) -> None:
        """``factor``: of every row (Gemma)."""
        super().__init__()
        self.weight_tiles = weight
        # Rounded to the weights' dtype, as transformers does.
        self.factor = float(torch.tensor(factor).to(weight.dtype))
        self.num_embeddings, self.embedding_dim = weight.channels, weight.inputs

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Takes ids [...] to rows [..., embedding_dim]."""
        rows = self.weight_tiles.gather(ids)
        return rows if self.factor == 1 else rows * self.factor

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.weight_tiles.dtype}"
