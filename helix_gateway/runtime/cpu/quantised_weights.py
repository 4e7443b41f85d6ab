"""Quantised matrices packed for `quantised_kernels.py`: from float weights, or from a GGUF's blocks as they are.

A `QuantisedWeight` stands where a packed float matrix would (`linear.py`): float32 rows go in and come out, each row's
bits its own, and within the activations' rounding to int8 it is the product with the matrix that `unpacked` gives.
Knows nothing about files or models.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from helix_gateway.runtime.cpu.emitter import F32_BYTES, LANES
from helix_gateway.runtime.cpu.four_bits import LARGEST, best_scales
from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS
from helix_gateway.runtime.cpu.packed import PackedWeight
from helix_gateway.runtime.cpu.quantised_kernels import (
    GROUP_INPUTS,
    INT4,
    INT8,
    INT8_CHANNELS,
    groups_together,
    tile_bytes,
)
from helix_gateway.runtime.cpu.quantised_products import multiply, quantise_rows, read_rows, tile_kernel
from helix_gateway.runtime.cpu.quantised_rows import num_groups, rows_bytes
from helix_gateway.runtime.cpu.threads import configure_threads

Bytes = npt.NDArray[np.uint8]

# Weights quantised and packed at a time, so that temporaries stay small beside the matrix.
_PIECE_WEIGHTS = 1 << 20
_LARGEST8, _OFFSET8 = 127, 128
# The inverse of a smaller one might not be finite.
_SMALLEST_SCALE = np.float32(1e-30)
# Eight times as much is the largest float16.
_LARGEST_Q4_0 = np.float16(8188)


class QuantisedWeight(PackedWeight):
    """A matrix [channels, inputs] as uint8 tiles [ceil(channels / 32), bytes of a tile]; zeros behind the last channel.

    Subclasses say what a tile is; `from_float` quantises, in pieces.
    """

    dtype = torch.float32
    format: ClassVar[int]

    def __init__(self, channels: int, inputs: int) -> None:
        """Memory for a matrix, to be filled tile by tile."""
        together = groups_together(self.format)
        self.channels, self.inputs = channels, inputs
        self.groups = -(-num_groups(inputs) // together) * together
        size = tile_bytes(self.format, self.groups)
        self.tiles = torch.empty(-(-channels // TILE_CHANNELS), size, dtype=torch.uint8)

    @classmethod
    def from_float(cls, weight: torch.Tensor) -> "QuantisedWeight":
        """Quantise a matrix of any floating dtype."""
        packed = cls(*weight.shape)
        piece = max(1, _PIECE_WEIGHTS // (TILE_CHANNELS * packed.inputs)) * TILE_CHANNELS
        for first in range(0, packed.channels, piece):
            rows = weight[first : first + piece].detach().float().numpy()
            packed._put(first // TILE_CHANNELS, *cls._quantised(_padded(rows, packed.groups)))
        return packed

    @staticmethod
    @abstractmethod
    def _quantised(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], ...]:
        """What `_put` takes, of rows [whole tiles, whole groups] of float32."""

    @abstractmethod
    def _put(self, first_tile: int, *numbers: npt.NDArray[Any]) -> None:
        """Write some whole tiles."""

    @property
    def operand(self) -> tuple[int, int, int, int, int]:
        """(format, address, bytes of a tile, groups, channels), as compiled code takes it."""
        return self.format, self.tiles.data_ptr(), self.tiles.shape[1], self.groups, self.channels

    def multiply(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + bias`` with x rounded to int8, row by row; float32 [rows, inputs] to [rows, channels]."""
        rows, width = x.shape[0], self.groups * GROUP_INPUTS
        out = torch.empty(rows, self.channels)
        if rows == 0:
            return out
        x = torch.nn.functional.pad(x, (0, width - self.inputs)).contiguous()
        room, threads = torch.empty(rows_bytes(rows, self.groups), dtype=torch.uint8), configure_threads()
        quantise_rows(threads, rows, x.data_ptr(), self.groups, groups_together(self.format) > 1, room.data_ptr())
        kernel = tile_kernel(self.format)
        multiply(threads, kernel, rows, room.data_ptr(), self.operand, bias.data_ptr(), out.data_ptr())
        return out

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix: ids of any shape to float32 [..., inputs].

        Raises:
            IndexError: an id is not a row's number.
        """
        wanted = ids.reshape(-1).to(torch.int64)
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < self.channels:
            raise IndexError(f"ids must lie in 0 .. {self.channels - 1}")
        rows = torch.empty(len(wanted), self.inputs)
        read_rows(configure_threads(), self.operand, wanted.numpy(), self.inputs, rows.numpy())
        return rows.view(*ids.shape, self.inputs)

    def unpacked(self) -> torch.Tensor:
        """The matrix that it is, float32 [channels, inputs]."""
        return self.gather(torch.arange(self.channels))


class Int8Weight(QuantisedWeight):
    """One float16 scale for 32 inputs of a channel."""

    format = INT8

    @classmethod
    def from_blocks(cls, blocks: Bytes) -> "Int8Weight":
        """The very numbers of GGUF's Q8_0: blocks [channels, groups, 34] of a float16 scale and 32 int8."""
        packed = cls(len(blocks), blocks.shape[1] * GROUP_INPUTS)
        for first, piece in _pieces(blocks):
            steps = piece[..., 2:].reshape(len(piece), -1).view(np.int8)
            packed._put(first // TILE_CHANNELS, steps, _halves(piece, 0))
        return packed

    @staticmethod
    def _quantised(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], ...]:
        groups = rows.reshape(len(rows), -1, GROUP_INPUTS)
        scales = (np.abs(groups).max(axis=2) / _LARGEST8).astype(np.float16)
        steps = np.clip(np.rint(groups * _inverse(scales)), -_LARGEST8, _LARGEST8)
        return steps.astype(np.int8).reshape(rows.shape), scales

    def _put(self, first_tile: int, *numbers: npt.NDArray[Any]) -> None:
        steps, scales = numbers
        count, groups = len(steps) // TILE_CHANNELS, self.groups
        tiles = self.tiles[first_tile : first_tile + count].numpy().reshape(count, groups, -1)
        tiles[..., : GROUP_INPUTS * TILE_CHANNELS] = _by_lanes(_unsigned(steps), count, groups)
        tiles[..., GROUP_INPUTS * TILE_CHANNELS :] = _of_groups(scales, count)


class Int8ChannelWeight(QuantisedWeight):
    """One float32 scale for a channel."""

    format = INT8_CHANNELS

    @staticmethod
    def _quantised(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], ...]:
        scales = np.abs(rows).max(axis=1) / np.float32(_LARGEST8)
        scales[scales < _SMALLEST_SCALE] = 0
        steps = np.rint(rows * _inverse(scales))
        return np.clip(steps, -_LARGEST8, _LARGEST8).astype(np.int8), scales

    def _put(self, first_tile: int, *numbers: npt.NDArray[Any]) -> None:
        steps, scales = numbers
        count, turns = len(steps) // TILE_CHANNELS, self.groups // groups_together(self.format)
        tiles = self.tiles[first_tile : first_tile + count].numpy()
        tail = F32_BYTES * TILE_CHANNELS
        tiles[:, :-tail] = _by_lanes(_unsigned(steps), count, turns).reshape(count, -1)
        tiles[:, -tail:] = scales.view(np.uint8).reshape(count, tail)


class Int4Weight(QuantisedWeight):
    """A float16 scale and minimum for 32 inputs of a channel."""

    format = INT4

    @classmethod
    def from_blocks(cls, blocks: Bytes) -> "Int4Weight":
        """The very numbers of GGUF's Q4_1, [channels, groups, 20], or of Q4_0, [channels, groups, 18].

        A block has a float16 scale, Q4_1's a minimum, then 16 bytes: inputs 0 to 15 in the low halves, the rest in the
        high ones.  Q4_0's numbers have 8 subtracted: a minimum of -8 scales, which float16 holds exactly.

        Raises:
            ValueError: a scale of Q4_0 is so large that eight of it are beyond float16.
        """
        packed = cls(len(blocks), blocks.shape[1] * GROUP_INPUTS)
        has_minimum = blocks.shape[2] == 20
        for first, piece in _pieces(blocks):
            scales = _halves(piece, 0)
            if not has_minimum and not (np.abs(scales) <= _LARGEST_Q4_0).all():
                raise ValueError("scales of Q4_0 are beyond 8,188")
            minima = _halves(piece, 2) if has_minimum else np.float16(-8) * scales
            packed._put(first // TILE_CHANNELS, piece[..., -16:], scales, minima)
        return packed

    @staticmethod
    def _quantised(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], ...]:
        groups = rows.reshape(len(rows), -1, GROUP_INPUTS)
        found = best_scales(configure_threads(), groups.reshape(-1, GROUP_INPUTS))
        scales, minima = (numbers.reshape(groups.shape[:2]).astype(np.float16) for numbers in found)
        steps = np.rint((groups - minima.astype(np.float32)[..., None]) * _inverse(scales))
        halves = np.clip(steps, 0, LARGEST).astype(np.uint8).reshape(*scales.shape, 2, GROUP_INPUTS // 2)
        return halves[..., 0, :] | halves[..., 1, :] << 4, scales, minima

    def _put(self, first_tile: int, *numbers: npt.NDArray[Any]) -> None:
        # Two inputs a byte, as a GGUF's blocks have them: those of a group's first half in the low halves of its bytes.
        pairs, scales, minima = numbers
        count, groups, half = len(pairs) // TILE_CHANNELS, self.groups, GROUP_INPUTS * TILE_CHANNELS // 2
        tiles = self.tiles[first_tile : first_tile + count].numpy().reshape(count, groups, -1)
        tiles[..., :half] = _by_lanes(pairs, count, groups)
        tiles[..., half : half + 2 * TILE_CHANNELS] = _of_groups(scales, count)
        tiles[..., half + 2 * TILE_CHANNELS :] = _of_groups(minima, count)


def _pieces(blocks: Bytes) -> Iterator[tuple[int, Bytes]]:
    """Whole tiles of blocks at a time, zeros behind the last channel; with the first channel of each."""
    piece = max(1, _PIECE_WEIGHTS // (TILE_CHANNELS * blocks.shape[1] * GROUP_INPUTS)) * TILE_CHANNELS
    for first in range(0, len(blocks), piece):
        yield first, _whole_tiles(blocks[first : first + piece])


def _whole_tiles(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    missing = -len(rows) % TILE_CHANNELS
    return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else rows


def _padded(rows: npt.NDArray[np.float32], groups: int) -> npt.NDArray[np.float32]:
    return _whole_tiles(np.pad(rows, [(0, 0), (0, groups * GROUP_INPUTS - rows.shape[1])]))


def _by_lanes(rows: Bytes, count: int, groups: int) -> Bytes:
    """Bytes of channels, in the order of some tiles: [tiles, groups, bytes], four of a channel beside four of the next."""
    words = np.ascontiguousarray(rows).view(np.uint32).reshape(count, 2, LANES, groups, -1)
    ordered = np.ascontiguousarray(words.transpose(0, 3, 1, 4, 2))
    return ordered.reshape(count, groups, -1).view(np.uint8)


def _halves(blocks: Bytes, byte: int) -> npt.NDArray[np.float16]:
    """The float16 that begins at a byte of each block."""
    return np.ascontiguousarray(blocks[..., byte : byte + 2]).view(np.float16)[..., 0]


def _inverse(scales: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """One over the scales of groups, as stored; 0 where a group is one number, or a channel zeros."""
    wide = scales.astype(np.float32)[..., None]
    return np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)


def _unsigned(steps: npt.NDArray[Any]) -> Bytes:
    """int8 as the bytes of ``w + 128``."""
    shifted: Bytes = steps.view(np.uint8) ^ np.uint8(_OFFSET8)
    return shifted


def _of_groups(halves: npt.NDArray[Any], count: int) -> Bytes:
    """float16 [channels, groups] as bytes [tiles, groups, 64]."""
    groups = halves.shape[1]
    ordered = halves.reshape(count, TILE_CHANNELS, groups).transpose(0, 2, 1)
    return np.ascontiguousarray(ordered).view(np.uint8).reshape(count, groups, 2 * TILE_CHANNELS)
