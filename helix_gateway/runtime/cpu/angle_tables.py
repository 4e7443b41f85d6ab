"""A rotary embedding's angles as the compiled steps read them.  Knows nothing of weights or pages."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from helix_gateway.runtime.cpu.layers import Angles
from helix_gateway.runtime.rotary import RotaryTable


class AngleTables:
    """The tables of a rotary embedding, of each kind that a model's layers have, one behind the other."""

    def __init__(self, rotary: RotaryTable, layer_kinds: Sequence[str]) -> None:
        """``layer_kinds``: what each layer tells the embedding, empty where there is nothing to tell."""
        self._rotary = rotary
        self._kinds = list(dict.fromkeys(layer_kinds))
        self.kind_of = [self._kinds.index(kind) for kind in layer_kinds]
        """For each layer, which of the tables it reads."""
        self._sources: list[torch.Tensor] = []
        self._angles = Angles(*(np.zeros((1, 0, 0), np.float32) for _ in range(2)))

    def reaching(self, longest: int) -> Angles:
        """Tables for contexts of up to ``longest`` tokens; made anew only when they have grown."""
        self._rotary.reserve(longest)
        pairs = [self._rotary.tables(torch.empty(0), *filter(None, [kind])) for kind in self._kinds]
        sources = [table for pair in pairs for table in pair]
        if len(sources) != len(self._sources) or any(a is not b for a, b in zip(sources, self._sources)):
            self._sources = sources
            self._angles = Angles(*(_stacked(tables) for tables in zip(*pairs, strict=True)))
        return self._angles


def _stacked(tables: Sequence[torch.Tensor]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[kinds, positions, dim]; a view where there is one kind."""
    return (tables[0][None] if len(tables) == 1 else torch.stack(list(tables))).numpy()
