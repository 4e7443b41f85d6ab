"""Translation token by token, for vocabularies that cut text alike and only number, or lack, some tokens otherwise.

The token-level intersection of Timor et al. 2025 (arXiv 2502.05202, algorithm 4): the draft model is held to tokens
whose bytes are a token of the target's too, so that drafts map one to one.  A token of the target's that it lacks is
read as the tokens that its bytes are cut into.
"""

from collections.abc import Sequence

import numpy as np

from helix_gateway.core.protocols import TranslatedDraft
from helix_gateway.core.step import UInt32s
from helix_gateway.text.translation.meanings import special_counterparts
from helix_gateway.text.translation.vocabulary import ByteEncoder, Vocabulary


class TokenTable:
    """Which tokens of two vocabularies are which.

    Args:
        target, draft: the vocabularies.
    """

    def __init__(self, target: Vocabulary, draft: Vocabulary) -> None:
        self._target = target
        self._encoder = ByteEncoder(draft)
        self._reads = _partners(target, draft)
        self._read_as: dict[int, tuple[int, ...]] = {token: (partner,) for token, partner in self._reads.items()}
        self.target_of_draft = _partners(draft, target)
        """The target's tokens by the draft model's, those that have one."""
        self.draft_prefix = draft.prompt_prefix

    def read(self, token: int) -> tuple[int, ...]:
        """What the draft model reads for a token of the target's."""
        found = self._read_as.get(token)
        if found is None:
            silent = not 0 <= token < len(self._target) or token in self._target.special_ids
            data = b"" if silent else self._target.bytes_of[token]
            found = self._read_as[token] = tuple(self._encoder.encode_behind(data)[0])
        return found

    def is_bos(self, token: int) -> bool:
        """Whether this is how the target begins a prompt."""
        return token == self._target.bos_token_id


class TokenTranslation:
    """`core.protocols.VocabularyTranslation` by a table.

    Args:
        target, draft: the vocabularies.
    """

    def __init__(self, target: Vocabulary, draft: Vocabulary) -> None:
        self._table = TokenTable(target, draft)
        self._num_draft_tokens = sum(map(bool, draft.bytes_of))
        pairs = self._table.target_of_draft
        self.shares_ids = all(token == partner for token, partner in pairs.items())

    def allowed(self, draft_vocab_size: int) -> UInt32s | None:
        """See the Protocol."""
        pairs = self._table.target_of_draft
        if len(pairs) == self._num_draft_tokens:
            return None
        bits = np.zeros(-(-draft_vocab_size // 32) * 32, np.uint8)
        bits[[token for token in pairs if token < draft_vocab_size]] = 1
        return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)

    def begin(self) -> "SequenceByToken":
        """See the Protocol."""
        return SequenceByToken(self._table)


class SequenceByToken:
    """`core.protocols.TranslatedSequence` by a table.

    Args:
        table: shared by all sequences.
    """

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._at_start = True
        self.draft_token_ids = list(table.draft_prefix)

    def extend(self, token_ids: Sequence[int]) -> int:
        """See the Protocol; all that was there stands."""
        known = len(self.draft_token_ids)
        for token in token_ids:
            if not (self._at_start and self._table.draft_prefix and self._table.is_bos(token)):
                self.draft_token_ids += self._table.read(token)
            self._at_start = False
        return known

    def to_target(self, draft_token_ids: Sequence[int]) -> TranslatedDraft:
        """See the Protocol; what follows a token that the target lacks is left out."""
        ids: list[int] = []
        for token in draft_token_ids:
            partner = self._table.target_of_draft.get(token)
            if partner is None:
                break
            ids.append(partner)
        return TranslatedDraft(ids, list(range(1, len(ids) + 1)))


def _partners(source: Vocabulary, other: Vocabulary) -> dict[int, int]:
    """Tokens of ``other`` that say the same bytes, or for special tokens mean the same, by tokens of ``source``."""
    found = special_counterparts(source, other)
    for token, piece in enumerate(source.bytes_of):
        partner = other.by_bytes.get(piece)
        if partner is not None and token not in source.special_ids:
            found[token] = partner
    return found
