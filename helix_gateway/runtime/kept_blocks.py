"""Blocks of rounded matrices, kept in Helix's cache folder for later starts.

A file is named by what is in it, and which one belongs to a model is remembered (`remembered.py`).  What cannot be written
is kept in memory; what has gone, or is not what was written, is as good as not there.  Knows nothing about rounding.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import structlog

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.cache_folder import cache_folder, forget_oldest, written_whole
from helix_gateway.runtime.checkpoints.protocol import Blocks
from helix_gateway.runtime.checkpoints.replaced import KeptBlocks
from helix_gateway.runtime.checkpoints.safetensors_file import SafetensorsTensor, read_safetensors
from helix_gateway.runtime.remembered import Remembered

log = structlog.get_logger(__name__)

_REMEMBERED_AS = "blocks"
_KEPT_FILES = 4
"""Each is as large as a model in four bits."""

Bytes = npt.NDArray[np.uint8]


class NamedBlocks(KeptBlocks, Protocol):
    """Blocks that tell apart what is in them."""

    digest: str
    """A name for all their numbers."""


class _InMemory:
    def __init__(self, numbers: Mapping[str, Bytes]) -> None:
        self._numbers, self.digest = numbers, _digest(numbers)

    def names(self) -> frozenset[str]:
        return frozenset(self._numbers)

    def read(self, name: str) -> Blocks:
        return Blocks("Q4_1", self._numbers[name])


class _InFile:
    def __init__(self, tensors: Mapping[str, SafetensorsTensor], digest: str) -> None:
        self._tensors, self.digest = tensors, digest

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def read(self, name: str) -> Blocks:
        return Blocks("Q4_1", _read(self._tensors[name]))


def keep_blocks(numbers: Mapping[str, Bytes], remembered: Remembered) -> NamedBlocks:
    """Keep Q4_1 blocks, [channels, groups, 20] of each name, for a later start under the same circumstances."""
    kept = _InMemory(numbers)
    try:
        _write(numbers, _file_of(kept.digest))
    except OSError as error:
        log.info("blocks_not_kept", folder=str(_folder()), reason=str(error))
        return kept
    remembered.put(_REMEMBERED_AS, kept.digest)
    forget_oldest(_folder(), _KEPT_FILES)
    return kept


def recall_blocks(remembered: Remembered) -> NamedBlocks | None:
    """What was kept under these circumstances; None where there is nothing, or it is not what was written."""
    digest = remembered.get(_REMEMBERED_AS)
    if not isinstance(digest, str):
        return None
    file = _file_of(digest)
    try:
        tensors = read_safetensors(file) if file.exists() else {}
        found = _digest({name: _read(tensor) for name, tensor in tensors.items()})
    except (ModelLoadError, OSError) as error:
        log.warning("kept_blocks_ignored", file=str(file), reason=str(error))
        return None
    if found != digest:
        if tensors:
            log.warning("kept_blocks_ignored", file=str(file), reason="they are not what was written")
        return None
    with suppress(OSError):  # what is used is kept longest
        os.utime(file)
    return _InFile(tensors, digest)


def _folder() -> Path:
    return cache_folder() / "rounded"


def _file_of(digest: str) -> Path:
    return _folder() / f"{digest[:32]}.safetensors"


def _read(tensor: SafetensorsTensor) -> Bytes:
    numbers: Bytes = tensor.read(None).numpy()
    return numbers


def _digest(numbers: Mapping[str, Bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(numbers):
        own = numbers[name]
        digest.update(f"{name} {own.dtype} {own.shape}\0".encode() + np.ascontiguousarray(own).tobytes())
    return digest.hexdigest()


def _write(numbers: Mapping[str, Bytes], file: Path) -> None:
    from safetensors.numpy import save_file

    with written_whole(file) as beside:
        try:
            save_file(dict(numbers), beside)
        except OSError:
            raise
        except Exception as error:  # the library has errors of its own for a full disk
            raise OSError(str(error)) from error
