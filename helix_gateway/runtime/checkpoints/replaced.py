"""Stored tensors of which some are taken in other blocks than their file has: rounded once, and kept.

Knows nothing about who rounded them, nor where they are kept.
"""

from collections.abc import Mapping
from typing import Protocol

import torch

from helix_gateway.runtime.checkpoints.protocol import Blocks, StoredTensor


class KeptBlocks(Protocol):
    """Blocks of some matrices, by the names under which these are stored."""

    def names(self) -> frozenset[str]:
        """Of which there are some."""

    def read(self, name: str) -> Blocks:
        """Of one of them, in memory that is the caller's."""


class _Replaced:
    """A `StoredTensor` of a file but for its blocks."""

    def __init__(self, stored: StoredTensor, name: str, kept: KeptBlocks) -> None:
        self._stored, self._name, self._kept = stored, name, kept
        self.nbytes, self.shape = stored.nbytes, stored.shape

    def blocks(self) -> Blocks:
        return self._kept.read(self._name)

    def read(self, dtype: torch.dtype | None) -> torch.Tensor:
        return self._stored.read(dtype)


def with_blocks(stored: Mapping[str, StoredTensor], kept: KeptBlocks | None) -> Mapping[str, StoredTensor]:
    """The same tensors, those with kept blocks in these; all as they are where none are kept."""
    names = frozenset() if kept is None else kept.names()
    return {
        name: _Replaced(tensor, name, kept) if kept is not None and name in names else tensor
        for name, tensor in stored.items()
    }
