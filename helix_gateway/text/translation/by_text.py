"""Translation through text, for any two tokenizers whose text is the bytes of their tokens.

The draft model reads the sequence's text as its own tokenizer cuts it, and what it writes is cut anew for the target: as
the target would have gone on from its own last tokens, which stay as they are.  So string-level matching (Timor et al.
2025, arXiv 2502.05202, algorithm 2) with the context window of transformers' universal assisted generation, but on
bytes, where characters may be torn, and with only a bounded end encoded again.  Special tokens go through as their
counterparts.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from helix_gateway.core.protocols import TranslatedDraft
from helix_gateway.core.step import UInt32s
from helix_gateway.text.translation.growing_text import GrowingText
from helix_gateway.text.translation.meanings import bytes_in, special_counterparts
from helix_gateway.text.translation.vocabulary import ByteEncoder, Vocabulary, complete_bytes, starts_character

_LOOKED_BACK_TOKENS = 32
_LOOKED_BACK_BYTES = 48
"""Of the target's text that a draft is cut together with, so that it goes on as the target's tokenizer would."""


class TextTranslation:
    """`core.protocols.VocabularyTranslation` through text; its own sequences read its tables.

    Args:
        target, draft: the vocabularies.
    """

    shares_ids = False

    def __init__(self, target: Vocabulary, draft: Vocabulary) -> None:
        self.target = target
        self.draft_prefix = draft.prompt_prefix
        self.target_encoder = ByteEncoder(target)
        self.draft_encoder = ByteEncoder(draft)
        self.said_to_draft = bytes_in(draft, target, special_counterparts(target, draft))
        """Bytes by the target's token ids, as the draft model's tokenizer is to encode them."""
        self.said_to_target = bytes_in(target, draft, special_counterparts(draft, target))
        """Bytes by the draft model's token ids, as the target's tokenizer is to encode them."""
        self.draft_end_ids = frozenset(draft.end_ids)

    def allowed(self, draft_vocab_size: int) -> UInt32s | None:
        """See the Protocol; a special token that the target lacks ends the draft."""
        return None

    def begin(self) -> "SequenceByText":
        """See the Protocol."""
        return SequenceByText(self)


class SequenceByText:
    """`core.protocols.TranslatedSequence` through text.

    Args:
        translation: what its pair of tokenizers have in common.
    """

    def __init__(self, translation: TextTranslation) -> None:
        self._translation = translation
        self._text = GrowingText(translation.draft_encoder, translation.draft_prefix)
        self._last: list[int] = []
        """The target's last tokens."""
        self._at_start = True

    @property
    def draft_token_ids(self) -> Sequence[int]:
        """See the Protocol."""
        return self._text.token_ids

    def extend(self, token_ids: Sequence[int]) -> int:
        """See the Protocol."""
        said = self._translation.said_to_draft
        self._last = [*self._last, *token_ids[-_LOOKED_BACK_TOKENS:]][-_LOOKED_BACK_TOKENS:]
        if self._at_start and token_ids:
            return self._text.append(self._start(token_ids))
        return self._text.append(b"".join([said[token] for token in token_ids if token < len(said)]))

    def _start(self, token_ids: Sequence[int]) -> bytes:
        """What the first tokens say, without what the target writes before any text: the draft model has its own."""
        translation = self._translation
        target, said = translation.target, translation.said_to_draft
        pieces: list[bytes] = []
        for token in token_ids:
            piece = said[token] if token < len(said) else b""
            if token == target.bos_token_id and translation.draft_prefix and not pieces:
                continue
            if self._at_start and piece and token not in target.special_ids:
                self._at_start = False
                piece = piece.removeprefix(b" ") if target.strips_leading_space else piece
            pieces.append(piece)
        return b"".join(pieces)

    def to_target(self, draft_token_ids: Sequence[int]) -> TranslatedDraft:
        """See the Protocol."""
        pieces = self._pieces(draft_token_ids)
        data = b"".join(pieces)
        unsaid = self._text.unsaid
        if not data.startswith(unsaid) or len(data) == len(unsaid):
            return TranslatedDraft([], [])
        ids, ends = self._cut(data[len(unsaid) :])
        ends = _without_gaps([self._translation.target.bytes_of[token] for token in ids], ends)
        del ids[len(ends) :]
        draft_ends = list(accumulate(map(len, pieces)))
        return TranslatedDraft(ids, [bisect_left(draft_ends, len(unsaid) + end) + 1 for end in ends])

    def _pieces(self, draft_token_ids: Sequence[int]) -> list[bytes]:
        """What the drafted tokens say, up to the first that means nothing to the target or ends the answer."""
        said = self._translation.said_to_target
        pieces: list[bytes] = []
        for token in draft_token_ids:
            piece = said[token] if token < len(said) else b""
            if not piece:
                break
            pieces.append(piece)
            if token in self._translation.draft_end_ids:
                break
        return pieces

    def _cut(self, data: bytes) -> tuple[list[int], list[int]]:
        """The target's tokens of bytes that follow its last tokens, and where in ``data`` each ends."""
        before = self._bytes_before()
        whole = before + data
        whole = whole[: complete_bytes(whole)]
        encoder = self._translation.target_encoder
        ids, ends = encoder.encode(whole)
        first = _tokens_behind(len(before), ids, ends, self._last)
        if first is None:
            # The target did not cut its last word as its tokenizer would have, so this is not how it goes on.
            return encoder.encode_behind(data[: max(len(whole) - len(before), 0)])
        return ids[first:], [end - len(before) for end in ends[first:]]

    def _bytes_before(self) -> bytes:
        """The end of the target's text, from where a token and a character begin."""
        bytes_of = self._translation.target.bytes_of
        data = b""
        for token in reversed(self._last):
            if len(data) >= _LOOKED_BACK_BYTES and starts_character(data, 0):
                break
            data = (bytes_of[token] if 0 <= token < len(bytes_of) else b"") + data
        return data


def _tokens_behind(place: int, ids: list[int], ends: list[int], last: list[int]) -> int | None:
    """The first token behind a place at which, as the target has it, its last token ends; None where none does so."""
    if not last:
        return 0
    for index in range(len(ids)):
        if ends[index] == place and ids[index] == last[-1]:
            return index + 1
    return None


def _without_gaps(pieces: list[bytes], ends: list[int]) -> list[int]:
    """Where tokens end, up to the first byte that the target has no token for."""
    for index, end in enumerate(accumulate(map(len, pieces))):
        if end != ends[index]:
            return ends[:index]
    return ends
