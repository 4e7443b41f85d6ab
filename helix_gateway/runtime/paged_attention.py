"""What attention over pages is to whoever computes a model's layers.

Knows nothing about how pages lie, nor about models.
"""

from typing import Protocol

import torch

from helix_gateway.core.step import StepBatch


class PagedAttention(Protocol):
    """Attention of one model's layers over the pages of one arena."""

    def begin(self, batch: StepBatch) -> None:
        """Take the tables of the step whose layers follow."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Write the layer's new keys and values into their pages, then attend over each row's own sequence.

        Args:
            layer: place of the layer in the order in which the model calls them.
            query: [1, heads, num_tokens, key_dim]
            key: [1, kv_heads, num_tokens, key_dim]
            value: [1, kv_heads, num_tokens, value_dim]
            scaling: factor of every score.
            softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2), if not None.

        Returns:
            [1, num_tokens, heads, value_dim], contiguous, of the query's dtype.
        """
