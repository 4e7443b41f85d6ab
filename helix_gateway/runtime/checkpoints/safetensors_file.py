"""Tensors of a safetensors file, each read from the file into memory of its own when asked for.

Follows the format's description: 8 bytes of header length, a JSON header of types, shapes and offsets, then the
bytes.  The `safetensors` library maps the file instead, and every page that was copied from stays in the resident
set until the last tensor is done, which doubles the peak of a load.  Knows nothing about models.
"""

import json
import math
import os
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import torch

from helix_gateway.core.errors import ModelLoadError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LENGTH_BYTES = 8
_PIECE_ELEMENTS = 1 << 19
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One tensor; see `StoredTensor`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""
    nbytes: int

    @property
    def block_kind(self) -> None:
        """None: there are none in this format."""
        return

    def read(self, dtype: torch.dtype | None) -> torch.Tensor:
        """Read it into memory of its own; see `StoredTensor`."""
        wanted = dtype if dtype is not None and self.dtype.is_floating_point else self.dtype
        values = torch.empty(math.prod(self.shape), dtype=wanted)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            if wanted == self.dtype:
                self._read_into(file, values)
            else:
                self._convert_into(file, values)
        return values.view(self.shape)

    def blocks(self) -> None:
        """None: there are none in this format."""
        return

    def _convert_into(self, file: RawIOBase, values: torch.Tensor) -> None:
        piece = torch.empty(min(len(values), _PIECE_ELEMENTS), dtype=self.dtype)
        for start in range(0, len(values), _PIECE_ELEMENTS):
            part = values[start : start + _PIECE_ELEMENTS]
            self._read_into(file, piece[: len(part)])
            part.copy_(piece[: len(part)])

    def _read_into(self, file: RawIOBase, values: torch.Tensor) -> None:
        if len(values) == 0:
            return
        view = values.view(torch.uint8).numpy().data
        while view:
            count = file.readinto(view)
            if not count:
                raise ModelLoadError(f"{self.path} is cut short. Download it again.")
            view = view[count:]


def read_safetensors(path: Path) -> dict[str, SafetensorsTensor]:
    """Return the tensors of one file by name.

    Raises:
        ModelLoadError: it cannot be read, or is no whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _read_header(file, size)
        entries = ((name, entry) for name, entry in header.items() if name != "__metadata__")
        return {name: _tensor(path, name, entry, start, size) for name, entry in entries}
    except OSError as error:
        raise ModelLoadError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{path} is no whole safetensors file: {error}. Download it again.") from error


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Return the header, and where the data begins."""
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 0 < length <= min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        raise ValueError(f"it has {size} bytes and claims a header of {length}")
    header: dict[str, Any] = json.loads(file.read(length))
    return header, _LENGTH_BYTES + length


def _tensor(path: Path, name: str, entry: dict[str, Any], start: int, size: int) -> SafetensorsTensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ModelLoadError(f"{path} holds {name} as {entry['dtype']}, a type that Helix does not load.")
    first, last = entry["data_offsets"]
    shape = tuple(int(length) for length in entry["shape"])
    if last - first != math.prod(shape) * dtype.itemsize or first < 0:
        raise ValueError(f"{name} of shape {shape} cannot take {last - first} bytes")
    if start + last > size:
        raise ValueError(f"it has {size} bytes where its tensors need {start + last}")
    return SafetensorsTensor(path, dtype, shape, start + first, last - first)
