"""Rotary position embeddings as tables, so that what a token gets depends on its position alone.

transformers computes cosines and sines for the positions of a step: vector code and its scalar rest differ in the last
bit, so a row's numbers would depend on how many rows are beside it.  A table filled in blocks of fixed size does not,
and costs a step one look-up.  Knows nothing about attention, nor how long a sequence may grow.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_BLOCK = 256
"""Positions computed at once; always the same ones together."""


class RotaryTable(nn.Module):
    """Stands in for a model's rotary embedding: ``(cos, sin)``, each [1, num_tokens, dim], looked up by position."""

    def __init__(self, embedding: nn.Module, max_positions: int) -> None:
        """Positions from ``max_positions`` on are never computed: a regime that changes there shall not show before."""
        super().__init__()
        self.embedding = embedding
        self.max_positions = max_positions
        self._tables: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._longest = 0

    def reserve(self, num_positions: int) -> None:
        """Make positions below ``num_positions`` available; a step's positions are known before it starts."""
        self._longest = max(self._longest, num_positions)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, *kind: Any, **named: Any
    ) -> tuple[torch.Tensor, ...]:
        """``x`` tells dtype and device; further arguments (Gemma's layer type) choose among tables."""
        flat = position_ids.reshape(-1)
        return tuple(table.index_select(0, flat)[None] for table in self.tables(x, *kind, **named))

    def tables(self, x: torch.Tensor, *kind: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole tables, each [num_positions, dim], as far as is reserved."""
        key = (x.dtype, *kind, *sorted(named.items()))
        if key not in self._tables or len(self._tables[key][0]) < self._longest:
            self._tables[key] = self._filled(x, kind, named)
        return self._tables[key]

    def _filled(
        self, x: torch.Tensor, kind: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of at least the reserved length; doubled, so that a growing context seldom fills one again."""
        blocks = 1
        while blocks * _BLOCK < self._longest:
            blocks *= 2
        length = min(blocks * _BLOCK, self.max_positions)
        parts = [self.embedding(x, block.to(x.device), *kind, **named) for block in self.blocks(length)]
        cosines, sines = zip(*parts, strict=True)
        return torch.cat(cosines, 1)[0], torch.cat(sines, 1)[0]

    @staticmethod
    def blocks(length: int) -> Iterator[torch.Tensor]:
        """Positions below ``length``, [1, num_tokens], as they are computed together."""
        for first in range(0, length, _BLOCK):
            yield torch.arange(first, min(first + _BLOCK, length))[None]


@dataclass(frozen=True, slots=True)
class Frequencies:
    """What a rotary embedding of one kind computes with."""

    inverse: list[float]
    """Radians a position, float32, of each pair that is turned."""
    factor: float
    """Of cosines and sines (YaRN, long rotary embeddings)."""


class FrequencyEmbedding(nn.Module):
    """A rotary embedding from its frequencies alone; of several kinds where layers tell theirs."""

    def __init__(self, kinds: Mapping[str, Frequencies]) -> None:
        """``kinds``: under what layers tell the embedding, empty where there is nothing to tell."""
        super().__init__()
        self._kinds = {
            kind: (torch.tensor(frequencies.inverse, dtype=torch.float32), frequencies.factor)
            for kind, frequencies in kinds.items()
        }

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """``(cos, sin)``, each [1, num_tokens, dim] of x's dtype, for position_ids [1, num_tokens]."""
        inverse, factor = self._kinds[kind]
        half = position_ids[..., None].float() * inverse
        angles = torch.cat((half, half), dim=-1)
        return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)


def frequencies_of(table: "RotaryTable", kinds: Collection[str]) -> dict[str, Frequencies] | None:
    """The frequencies of a model's embedding; None where it is, to the last bit, not what these make of it."""
    found = {}
    for kind in kinds:
        prefix = f"{kind}_" if kind else ""
        inverse = getattr(table.embedding, f"{prefix}inv_freq", None)
        if not isinstance(inverse, torch.Tensor):
            return None
        factor = float(getattr(table.embedding, f"{prefix}attention_scaling", 1.0))
        found[kind] = Frequencies(inverse.float().tolist(), factor)
    return found if _are_alike(table, FrequencyEmbedding(found), kinds) else None


def _are_alike(table: "RotaryTable", other: nn.Module, kinds: Collection[str]) -> bool:
    return all(
        torch.equal(a, b)
        for kind in kinds
        for block in table.blocks(table.max_positions)
        for a, b in zip(*(each(torch.empty(0), block, *filter(None, [kind])) for each in (table.embedding, other)))
    )


def install_rotary_tables(model: nn.Module, max_positions: int) -> tuple[RotaryTable, ...]:
    """Replace every rotary embedding of a model (found by its ``inv_freq`` buffers) by a table."""
    tables = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(parent, RotaryTable) and _is_rotary(child):
                table = RotaryTable(child, max_positions)
                setattr(parent, name, table)
                tables.append(table)
    return tuple(tables)


def _is_rotary(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
