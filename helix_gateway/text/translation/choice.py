"""Chooses how the tokens of a target model and of a draft model are translated, by how much they have in common."""

import structlog

from helix_gateway.core.errors import DraftVocabularyError
from helix_gateway.core.protocols import VocabularyTranslation
from helix_gateway.text.token_bytes import TokenBytes
from helix_gateway.text.tokenizer import Tokenizer
from helix_gateway.text.translation.by_text import TextTranslation
from helix_gateway.text.translation.by_token import TokenTranslation
from helix_gateway.text.translation.sample import SAMPLE_TEXT
from helix_gateway.text.translation.vocabulary import Vocabulary

_log = structlog.get_logger(__name__)

_CUT_ALIKE = 0.95
"""Share of a text's tokens that have to be the same for a draft model to read the target's tokens one by one."""
_KEPT = 0.8
"""Share of a text that a tokenizer has to give back: one that changes more is no way to say it."""


def translate_vocabularies(target: Tokenizer, draft: Tokenizer) -> VocabularyTranslation | None:
    """What stands between a target model and a draft model; None where their tokens are the same, ids and all.

    Others go through one by one where both tokenizers cut text alike, else through text.

    Raises:
        DraftVocabularyError: the tokens of one say nothing that the other could read.
    """
    if target.ids_by_spelling() == draft.ids_by_spelling():
        return None
    ours = Vocabulary(target, _known(target, "The model's"))
    theirs = Vocabulary(draft, _known(draft, "The draft model's"))
    _check_kept(ours, "The model's")
    _check_kept(theirs, "The draft model's")
    alike = share_cut_alike(ours, theirs)
    by_token = alike >= _CUT_ALIKE and ours.strips_leading_space is theirs.strips_leading_space
    _log.info("draft_vocabulary_translated", through="tokens" if by_token else "text", tokens_cut_alike=round(alike, 3))
    return TokenTranslation(ours, theirs) if by_token else TextTranslation(ours, theirs)


def share_cut_alike(target: Vocabulary, draft: Vocabulary) -> float:
    """Of the draft model's tokens of a text, the share that are tokens of the target's, cut at the same places."""
    ours, theirs = _spans(target), _spans(draft)
    return len(ours & theirs) / max(1, len(theirs))


def _spans(vocabulary: Vocabulary) -> set[tuple[int, bytes]]:
    """Each token of the sample: where it begins, and what it says."""
    spans: set[tuple[int, bytes]] = set()
    at = 0
    for token in vocabulary.encode(SAMPLE_TEXT, add_special_tokens=False):
        spans.add((at, vocabulary.bytes_of[token]))
        at += len(vocabulary.bytes_of[token])
    return spans


def _known(tokenizer: Tokenizer, whose: str) -> TokenBytes:
    table = tokenizer.token_bytes_table
    if table is None:
        raise DraftVocabularyError(
            f"{whose} tokenizer is of a kind whose tokens are not the bytes of its text, and the two models' tokens "
            "differ, so that one cannot draft for the other. Choose a draft model of the same family, or one with "
            "byte-level or sentencepiece tokens."
        )
    return table


def _check_kept(vocabulary: Vocabulary, whose: str) -> None:
    ids = vocabulary.encode(SAMPLE_TEXT, add_special_tokens=False)
    said = b"".join([vocabulary.bytes_of[token] for token in ids if token not in vocabulary.special_ids])
    text = said.decode("utf-8", errors="replace")
    kept = _share_kept(text.split(), SAMPLE_TEXT.split())
    if kept < _KEPT:
        raise DraftVocabularyError(
            f"{whose} tokenizer changes the text that it encodes ({1 - kept:.0%} of a sample's words were others "
            "afterwards), so that the draft model cannot say what the model would. Choose another draft model."
        )


def _share_kept(words: list[str], expected: list[str]) -> float:
    """Of the expected words, how many stand there."""
    found = set(words)
    return sum(word in found for word in expected) / len(expected)
