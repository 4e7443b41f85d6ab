"""Two tokenizers whose tokens are the same, id by id: nothing is translated."""

from collections.abc import Sequence

from helix_gateway.core.protocols import TranslatedDraft
from helix_gateway.core.step import UInt32s


class SameVocabulary:
    """`core.protocols.VocabularyTranslation` for a draft model that has every token of the target's under its id.

    Args:
        num_tokens: ids of the target's tokens are below this; the draft model may have more of its own.
    """

    shares_ids = True

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def allowed(self, draft_vocab_size: int) -> UInt32s | None:
        """All: ids beyond the target's are rows that no tokenizer writes, or are cut off where one does."""
        return None

    def begin(self) -> "SameSequence":
        """See the Protocol."""
        return SameSequence(self._num_tokens)


class SameSequence:
    """`core.protocols.TranslatedSequence` that says what it is told.

    Args:
        num_tokens: as above.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self.draft_token_ids: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> int:
        """See the Protocol; all that was there stands."""
        known = len(self.draft_token_ids)
        self.draft_token_ids += token_ids
        return known

    def to_target(self, draft_token_ids: Sequence[int]) -> TranslatedDraft:
        """See the Protocol."""
        ids: list[int] = []
        for token in draft_token_ids:
            if token >= self._num_tokens:
                break
            ids.append(token)
        return TranslatedDraft(ids, list(range(1, len(ids) + 1)))
