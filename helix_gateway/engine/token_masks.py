"""Which tokens the constraints of a batch allow at each position of each verify window, as bits.

A constraint is led along the drafts and back again, so that each row is sampled as plain decoding would have: under the
state after the tokens before it.  Knows nothing about what a constraint stands for.
"""

from collections.abc import Sequence as Ordered

import numpy as np

from helix_gateway.core.protocols import TokenConstraint
from helix_gateway.core.step import UInt32s
from helix_gateway.engine.sequence import Sequence

_BITS = 32
_ALL = np.uint32(0xFFFF_FFFF)


class ConstraintFailedError(Exception):
    """A request's constraint raised, and nothing of the step is committed; the message is the request's id."""

    def __init__(self, request_id: str, cause: Exception) -> None:
        super().__init__(request_id)
        self.cause = cause


def join_masks(windows: Ordered[tuple[Sequence, Ordered[int]]], vocab_size: int) -> UInt32s | None:
    """The masks of a batch's sampled rows, [num_samples, ceil(vocab_size / 32)]; None where nobody is constrained.

    Args:
        windows: each sampled sequence and its draft tokens; it has one row more than drafts.

    Raises:
        ConstraintFailedError: a constraint raised.
    """
    if all(sequence.constraint is None for sequence, _ in windows):
        return None
    count = sum(1 + len(drafts) for _, drafts in windows)
    masks = np.full((count, -(-vocab_size // _BITS)), _ALL, np.uint32)
    row = 0
    for sequence, drafts in windows:
        if sequence.constraint is not None:
            try:
                _fill_along(sequence.constraint, drafts, sequence.stop_ids, masks[row:])
            except Exception as error:
                raise ConstraintFailedError(sequence.request.request_id, error) from error
        row += 1 + len(drafts)
    return masks


def _fill_along(constraint: TokenConstraint, drafts: Ordered[int], stop_ids: frozenset[int], masks: UInt32s) -> None:
    """Fill one mask more than there are drafts, up to the first draft behind which no row can count."""
    constraint.fill_mask(masks[0])
    taken = 0
    try:
        for token in drafts:
            if token in stop_ids or not _allows(masks[taken], token):
                break
            constraint.advance(token)
            taken += 1
            constraint.fill_mask(masks[taken])
    finally:
        constraint.rollback(taken)


def _allows(mask: UInt32s, token_id: int) -> bool:
    word, bit = divmod(token_id, _BITS)
    return bool(int(mask[word]) >> bit & 1)
