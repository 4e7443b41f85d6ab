"""How many draft tokens a sequence gets at a step.

A policy sees sequences, never tokens' values; the scheduler bounds what it wishes by budget and blocks.
"""

from typing import Protocol

from helix_gateway.engine.sequence import Sequence


class DepthPolicy(Protocol):
    """Chooses depths."""

    def depth(self, sequence: Sequence) -> int:
        """Most draft tokens worth verifying for the sequence at this step; 0 for none."""


class FixedDepth:
    """The same depth for every sequence at every step, as far as its request and its end allow.

    Args:
        depth: draft tokens a step.
        max_model_len: tokens that prompt and output may have together.
    """

    def __init__(self, depth: int, *, max_model_len: int) -> None:
        self._depth = depth
        self._max_model_len = max_model_len

    def depth(self, sequence: Sequence) -> int:
        """The fixed depth, or as much of it as can still be accepted."""
        request = sequence.request
        # The step yields one token more than the drafts it accepts.
        left = self._max_model_len - len(sequence.token_ids) - 1
        if request.sampling.max_tokens is not None:
            left = min(left, request.sampling.max_tokens - sequence.num_output_tokens - 1)
        wished = self._depth if request.max_depth is None else min(self._depth, request.max_depth)
        return max(0, min(wished, left))
