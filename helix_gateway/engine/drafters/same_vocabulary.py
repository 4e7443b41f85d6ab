"""The translation between two models of one vocabulary: none.

`core.protocols.VocabularyTranslation` for draft models whose tokens are the target's own, ids and all.  Their tables of
embeddings may be padded to different sizes; ids beyond either's are no tokens.
"""

from collections.abc import Sequence

import numpy as np

from helix_gateway.core.protocols import TranslatedDraft
from helix_gateway.core.step import UInt32s

_BITS = 32


class SameVocabulary:
    """Every id means the same in both.

    Args:
        target_vocab_size, draft_vocab_size: logits that a row of each model has.
    """

    shares_ids = True

    def __init__(self, target_vocab_size: int, draft_vocab_size: int) -> None:
        self._target_vocab_size = target_vocab_size
        self._draft_vocab_size = draft_vocab_size

    def allowed(self, draft_vocab_size: int) -> UInt32s | None:
        """All that the target has."""
        if draft_vocab_size <= self._target_vocab_size:
            return None
        bits = np.zeros(-(-draft_vocab_size // _BITS) * _BITS, np.uint8)
        bits[: self._target_vocab_size] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def begin(self) -> "SameTokens":
        """The state of a fresh sequence."""
        return SameTokens(self._draft_vocab_size)


class SameTokens:
    """One sequence, as it is.

    Args:
        vocab_size: ids that the draft model can read are below it.
    """

    def __init__(self, vocab_size: int) -> None:
        self.draft_token_ids: list[int] = []
        self._vocab_size = vocab_size

    def extend(self, token_ids: Sequence[int]) -> int:
        """All that was known stands.  Raises ValueError for an id that the draft model does not have."""
        if token_ids and max(token_ids) >= self._vocab_size:
            raise ValueError(f"the draft model has no token {max(token_ids)}")
        known = len(self.draft_token_ids)
        self.draft_token_ids += token_ids
        return known

    def to_target(self, draft_token_ids: Sequence[int]) -> TranslatedDraft:
        """Themselves."""
        return TranslatedDraft(list(draft_token_ids), list(range(1, len(draft_token_ids) + 1)))
