"""A GGUF file's metadata and where its tensors lie, read without touching what is not asked for.

Follows the GGUF specification, version 3 (and 2, which reads the same): a header, key-value pairs, tensor infos,
then aligned data.  The `gguf` library's own reader makes several numpy arrays for every string of a vocabulary
(1.6 s for 49,152 tokens; this one takes 0.05 s), so here arrays are stepped over and decoded when asked for.
Types, block sizes and dequantisation are the library's.  The tokenizer's keys are read by a walk of its own
(`text/gguf_metadata.py`): the two rooms do not see each other, and what they share is the format alone.  Knows nothing
about models.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from helix_gateway.core.errors import ModelLoadError

Scalar: TypeAlias = int | float | bool | str

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its shape in row-major order, and its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    """From the start of the file."""
    nbytes: int


class _Cursor:
    """Reads little-endian values one after another; reading past the end is an error, as in a truncated file."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self.data = data
        self.offset = offset

    def take(self, code: str) -> Scalar:
        size = struct.calcsize("<" + code)
        value: Scalar = struct.unpack("<" + code, self.skip(size))[0]
        return value

    def integer(self, code: str) -> int:
        return int(self.take(code))

    def string(self) -> str:
        return self.skip(self.integer("Q")).decode("utf-8", errors="replace")

    def skip(self, size: int) -> bytes:
        start, self.offset = self.offset, self.offset + size
        if self.offset > len(self.data):
            raise EOFError("it ends within its header")
        return self.data[start : self.offset]

    def skip_strings(self, count: int) -> None:
        """Pass by so many strings: a vocabulary has a hundred thousand, so nothing is made of them."""
        offset, data, length_at = self.offset, self.data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            offset += 8 + length_at(data, offset)[0]
        self.offset = offset
        if offset > len(data):
            raise EOFError("it ends within its header")

    def value(self) -> "Scalar | _Array":
        kind = GGUFValueType(self.integer("I"))
        if kind is GGUFValueType.ARRAY:
            return _Array.passed_by(self)
        return self.string() if kind is GGUFValueType.STRING else self.take(_FORMATS[kind])


@dataclass(frozen=True, slots=True)
class _Array:
    """Where an array lies, decoded when asked for."""

    type: GGUFValueType
    length: int
    offset: int

    @classmethod
    def passed_by(cls, cursor: _Cursor) -> "_Array":
        """The array at the cursor, which is left behind it."""
        array = cls(GGUFValueType(cursor.integer("I")), cursor.integer("Q"), cursor.offset)
        if array.type is GGUFValueType.STRING:
            cursor.skip_strings(array.length)
        else:
            cursor.skip(array.length * struct.calcsize("<" + _FORMATS[array.type]))
        return array

    def decode(self, data: mmap.mmap) -> list[Scalar]:
        cursor = _Cursor(data, self.offset)
        if self.type is GGUFValueType.STRING:
            return [cursor.string() for _ in range(self.length)]
        code = f"<{self.length}{_FORMATS[self.type]}"
        return list(struct.unpack(code, cursor.skip(struct.calcsize(code))))


class GGUFFile:
    """One memory-mapped GGUF file.

    Raises:
        ModelLoadError: it is no GGUF file, is damaged, or is cut short; the message is one line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._metadata: dict[str, Scalar | _Array] = {}
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header()
        except OSError as error:
            raise ModelLoadError(f"Cannot read {path}: {error.strerror or error}.") from error
        except (EOFError, KeyError, ValueError, OverflowError, struct.error) as error:
            raise ModelLoadError(f"{path} is no whole GGUF file: {error}. Download it again.") from error

    def get(self, key: str) -> Scalar | None:
        """Return a scalar of the metadata, or None where the file does not have it."""
        value = self._metadata.get(key)
        return None if isinstance(value, _Array) else value

    def get_array(self, key: str) -> list[Scalar] | None:
        """Return an array of the metadata, or None where the file does not have it."""
        value = self._metadata.get(key)
        return value.decode(self._data) if isinstance(value, _Array) else None

    def rows(self, tensor: TensorInfo) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes, [rows, bytes a row], from a mapping of their own that ends with the array.

        One mapping for the whole file would keep every page that was read in this process's resident set.
        """
        num_rows = math.prod(tensor.shape[:-1])
        shape = (num_rows, tensor.nbytes // num_rows)
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=shape)

    def _read_header(self) -> None:
        cursor = _Cursor(self._data, 0)
        if cursor.skip(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not begin with the letters GGUF")
        version = cursor.integer("I")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, and {_VERSIONS[0]} and {_VERSIONS[1]} are known")
        num_tensors, num_pairs = cursor.integer("Q"), cursor.integer("Q")
        for _ in range(num_pairs):
            key = cursor.string()
            self._metadata[key] = cursor.value()
        infos = [_tensor_info(cursor) for _ in range(num_tensors)]
        alignment = int(self.get("general.alignment") or _DEFAULT_ALIGNMENT)
        start = math.ceil(cursor.offset / alignment) * alignment
        self.tensors = {info.name: info for info in (make(start) for make in infos)}
        self._check_extent()

    def _check_extent(self) -> None:
        end = max((info.offset + info.nbytes for info in self.tensors.values()), default=0)
        if end > len(self._data):
            raise EOFError(f"it has {len(self._data)} bytes where its tensors need {end}")


def _tensor_info(cursor: _Cursor) -> Callable[[int], TensorInfo]:
    """Read one info; where the data starts is known only once all have been read."""
    name = cursor.string()
    num_dimensions = cursor.integer("I")
    if not 0 < num_dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(reversed([cursor.integer("Q") for _ in range(num_dimensions)]))
    kind = GGMLQuantizationType(cursor.integer("I"))
    offset = cursor.integer("Q")
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) == 0 or shape[-1] % block_size:
        raise ValueError(f"tensor {name!r} of shape {shape} cannot be of type {kind.name}")
    nbytes = math.prod(shape) // block_size * block_bytes
    return lambda start: TensorInfo(name, shape, kind, start + offset, nbytes)
