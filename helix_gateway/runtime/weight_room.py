"""Whether models' weights fit into memory, told before any is read; and what to do where they do not.

What is counted is a lower bound: matrices alone, a table of tokens once where a file holds two that may be one, and nothing
for keys and values, activations or what loading takes besides.  So whoever is refused could not have been served; who is
not may still run out of memory later.  Of how weights are read it knows what each becomes, no more.
"""

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from helix_gateway.core.errors import HelixError, ModelLoadError
from helix_gateway.runtime.checkpoints.protocol import StoredSize
from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS
from helix_gateway.runtime.cpu.quantised_kernels import GROUP_INPUTS, groups_together, turn_bytes
from helix_gateway.runtime.cpu.reading import kind_for, kind_of_blocks, of_tables
from helix_gateway.runtime.description import Form
from helix_gateway.runtime.device import obtainable_memory_bytes
from helix_gateway.runtime.heap import return_freed_blocks
from helix_gateway.runtime.loading import stored_sizes, unused_names

_Together: TypeAlias = Callable[[Iterable[int]], int]
_MOST_GROWTH = 32
"""Times a file's size that its weights take at most: 20 where a GGUF with 1.56 bits a weight becomes float32."""
_STACKED_BYTES = 2
"""Of a number of several matrices in one tensor, which are not quantised: bfloat16 at least."""
_MUCH_LESS = 0.9
"""Of the memory that was too little: what is worth trying takes no more."""


class NoRoomError(ModelLoadError):
    """There is too little memory for the weights; the message says how much, and what to do."""


def is_ample(paths: Sequence[str], device: torch.device) -> bool:
    """Whether there is room for some models in whatever form, as the sizes of their files tell at once."""
    free = min(obtainable_memory_bytes(place) for place in (device, torch.device("cpu")))
    return sum(_file_bytes(Path(path)) for path in paths) * _MOST_GROWTH <= free


@dataclass(frozen=True, slots=True)
class Weights:
    """Of one model, as they will be held."""

    path: str
    form: Form


@dataclass(frozen=True, slots=True)
class WeightRoom:
    """The weights of all models that are loaded together, beside the memory that there is for them."""

    weights: Sequence[Weights]
    device: torch.device
    others: Mapping[str, Form]
    """How else they could be held, by the options for that."""

    def check(self) -> None:
        """Make sure that there is room, as far as can be told without reading them.

        Raises:
            NoRoomError: there is not.
            ModelLoadError: a file cannot be read.
        """
        if self._lacking(self._stored()) is None:
            return
        # A model that was dropped may still lie about, and what a file holds need not all be of the model.
        gc.collect()
        return_freed_blocks()
        used = self._used()
        lacking = self._lacking(used)
        if lacking is not None:
            together, needed, free = lacking
            raise NoRoomError(
                f"The weights of {self._names} take {_size(needed)}, and {_size(free)} of memory are free: "
                f"{self._advice(used, free, together)}."
            )

    def run_out(self) -> NoRoomError:
        """What to raise where memory ran out while they were loaded."""
        begun = f"Memory ran out while {self._names} was being loaded"
        try:
            stored = self._stored()
        except HelixError:  # too little is left even to look at the files
            return NoRoomError(f"{begun}: {self._advice([], 0)}.")
        needed = sum(self._needed_bytes(stored))
        return NoRoomError(
            f"{begun}, which takes more than the {_size(needed)} of its "
            f"weights; {_size(obtainable_memory_bytes(self.device))} are free: {self._advice(stored, needed * _MUCH_LESS)}."
        )

    @property
    def _names(self) -> str:
        return " and ".join(each.path for each in self.weights)

    def _lacking(self, stored: Sequence[Mapping[str, StoredSize]]) -> tuple[_Together, int, int] | None:
        """What all models need together, and how that is told of each; what is free, in bytes, where it is less."""
        needed = self._needed_bytes(stored)
        rooms: list[tuple[_Together, int, int]] = []
        if self.device.type in ("cpu", "mps", "cuda"):  # others do not tell what they have
            rooms.append((sum, sum(needed), obtainable_memory_bytes(self.device)))
        if self.device.type not in ("cpu", "mps"):
            # One model after the other goes through the machine's memory.
            rooms.append((max, max(needed), obtainable_memory_bytes(torch.device("cpu"))))
        return next((each for each in rooms if each[1] > each[2]), None)

    def _stored(self) -> list[Mapping[str, StoredSize]]:
        return [stored_sizes(each.path) for each in self.weights]

    def _used(self) -> list[Mapping[str, StoredSize]]:
        """Without what transformers passes over, which takes transformers to know."""
        return [_without_unused(each.path, stored) for each, stored in zip(self.weights, self._stored(), strict=True)]

    def _needed_bytes(self, stored: Sequence[Mapping[str, StoredSize]]) -> list[int]:
        pairs = zip(self.weights, stored, strict=True)
        return [held_bytes(tensors, each.form) for each, tensors in pairs]

    def _advice(self, stored: Sequence[Mapping[str, StoredSize]], below_bytes: float, together: _Together = sum) -> str:
        """What to do; of ways to hold them those that take no more than so much, and that are not in use."""
        fitting = [
            option
            for option, form in self.others.items()
            if together([held_bytes(tensors, form) for tensors in stored] or [0]) <= below_bytes
            and any(form != each.form for each in self.weights)
        ]
        return f"use {', '.join([*fitting, 'a smaller model'])}, or end other programs"


def held_bytes(tensors: Mapping[str, StoredSize], form: Form) -> int:
    """Memory that a model's stored tensors take at least, or within a hundredth, once they are held in some form.

    Args:
        tensors: what is stored, by the file's names.
        form: that of the model.
    """
    matrices = {name: tensor for name, tensor in tensors.items() if len(tensor.shape) in (2, 3)}
    tables = _tables(matrices)
    sizes = {name: _held_bytes(tensor, form, is_table=name in tables) for name, tensor in matrices.items()}
    return sum(sizes.values()) - sum(sizes[name] for name in tables[1:])


def _held_bytes(tensor: StoredSize, form: Form, *, is_table: bool) -> int:
    numbers = math.prod(tensor.shape)
    if form.quantisation is None:
        return numbers * form.torch_dtype.itemsize
    if len(tensor.shape) == 3:
        return numbers * _STACKED_BYTES
    channels, inputs = tensor.shape
    if form.quantisation == "file" and tensor.block_kind is not None:
        packed = kind_of_blocks(tensor.block_kind).format
    else:
        # With int4 some get eight bits all the same: which, the model's structure tells, and a lower bound need not know.
        takes_more = is_table and form.quantisation != "int4"
        packed = kind_for(inputs, of_tables(form.quantisation) if takes_more else form.quantisation).format
    together = GROUP_INPUTS * groups_together(packed)
    return channels * (inputs // together * turn_bytes(packed)) // TILE_CHANNELS


def _tables(matrices: Mapping[str, StoredSize]) -> list[str]:
    """Those that have the most rows: input and output embedding, which may be tied though both are stored."""
    most = max((tensor.shape[0] for tensor in matrices.values()), default=0)
    return [name for name, tensor in matrices.items() if tensor.shape[0] == most]


def _without_unused(path: str, tensors: Mapping[str, StoredSize]) -> Mapping[str, StoredSize]:
    unused = unused_names(path, tensors) if Path(path).is_dir() else set()
    return {name: tensor for name, tensor in tensors.items() if name not in unused}


def _file_bytes(path: Path) -> int:
    """Of a file, or all of a folder's; 0 where there is none, which whoever reads it tells."""
    try:
        files = list(path.iterdir()) if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def _size(num_bytes: int) -> str:
    if num_bytes >= 1 << 30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 10 << 20 else f"{num_bytes / 2**20:.2f} MiB"
