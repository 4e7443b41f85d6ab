"""Rotary position embeddings as tables, so that what a token gets depends on its position alone.

transformers computes cosines and sines for the positions of a step: vector code and its scalar rest differ in the last
bit, so a row's numbers would depend on how many rows are beside it.  A table filled in blocks of fixed size does not,
and costs a step one look-up.  Knows nothing about attention, nor how long a sequence may grow.
"""

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
        self._max_positions = max_positions
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
        length = min(blocks * _BLOCK, self._max_positions)
        parts = [
            self.embedding(x, torch.arange(first, min(first + _BLOCK, length), device=x.device)[None], *kind, **named)
            for first in range(0, length, _BLOCK)
        ]
        cosines, sines = zip(*parts, strict=True)
        return torch.cat(cosines, 1)[0], torch.cat(sines, 1)[0]


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
