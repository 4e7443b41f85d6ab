"""Sentencepiece's BPE with byte fallback, as a backend of the `tokenizers` library.

Sentencepiece keeps no merges: it joins whichever two neighbours make the best-scoring token (Kudo and Richardson 2018;
`bpe_model.cc`), so the merges are found again from the scores.  Knows nothing about the files that it comes in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from helix_gateway.text.definition import Merges, TokenType

_SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class SentencePieceVocabulary:
    """Tokens in the order of their ids; the three lists are of one length."""

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unknown_id: int


class SpacePrefix(Enum):
    """Which texts get a space before them that decoding takes away again."""

    NONE = auto()
    FIRST_TEXT = auto()
    """The one that begins a prompt."""
    EVERY_TEXT = auto()
    """That, and each that follows a special token."""


def build_sentencepiece(vocabulary: SentencePieceVocabulary, prefix: SpacePrefix) -> tuple[Tokenizer, Merges]:
    """The backend, without its added tokens, and its merges.

    Raises:
        IndexError: the lists are not of one length, or the unknown token is not among them.
    """
    merges = _merges(vocabulary)
    backend = Tokenizer(
        models.BPE(
            vocab={text: index for index, text in enumerate(vocabulary.tokens)},
            merges=merges,
            unk_token=vocabulary.tokens[vocabulary.unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    _set_spaces(backend, prefix)
    return backend, merges


def _set_spaces(backend: Tokenizer, prefix: SpacePrefix) -> None:
    # A normalizer runs on each text between added tokens, a pre-tokenizer knows which of them is the first.
    if prefix is SpacePrefix.FIRST_TEXT:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    else:
        before = [normalizers.Prepend(_SPACE)] if prefix is SpacePrefix.EVERY_TEXT else []
        backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    strip = [] if prefix is SpacePrefix.NONE else [decoders.Strip(" ", 1, 0)]
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)


def _merges(vocabulary: SentencePieceVocabulary) -> Merges:
    """The rank of a merge is the score of what it makes."""
    types, scores = vocabulary.types, vocabulary.scores
    mergeable = {text: index for index, text in enumerate(vocabulary.tokens) if types[index] == TokenType.NORMAL}
    ranked = sorted(mergeable, key=lambda text: (-scores[mergeable[text]], mergeable[text]))
    return [pair for text in ranked for pair in _pairs_that_make(text, mergeable)]


def _pairs_that_make(text: str, mergeable: Mapping[str, int]) -> Merges:
    pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
    return [pair for pair in pairs if pair[0] in mergeable and pair[1] in mergeable]
