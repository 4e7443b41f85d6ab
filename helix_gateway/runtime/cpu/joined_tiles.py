"""Products that read the same input, joined into one.  Knows nothing of what a step does with them."""

from collections.abc import Sequence

import torch

from helix_gateway.runtime.cpu.linear import PackedLinear
from helix_gateway.runtime.cpu.packed import PackedWeight
from helix_gateway.runtime.cpu.weight_memory import WeightMemory


def join_tiles(parts: Sequence[PackedLinear], memory: WeightMemory | None = None) -> torch.Tensor:
    """Tiles of several products one after another; each part goes on as a view of them, so nothing is held twice.

    Where there is a memory for weights, they are moved there.
    """
    weights: list[PackedWeight] = [part.weight_tiles for part in parts]
    joined = weights[0].tiles if len(weights) == 1 else torch.cat([weight.tiles for weight in weights])
    if memory is not None:
        joined = memory.move(joined)
    first = 0
    for weight in weights:
        weight.tiles = joined[first : first + len(weight.tiles)]
        first += len(weight.tiles)
    return joined
