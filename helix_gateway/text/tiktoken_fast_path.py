r"""Encodes with tiktoken where that is certain to give what the reference tokenizer gives, several times as fast.

tiktoken merges any two neighbours whose joined bytes are a token, the lowest id first; a BPE merges the pairs on its
list, in the list's order.  These are the same when (a) ids of what the merges make never fall along the list, and
(b) every token's own bytes merge back into that token.  For by (b) a token's bytes have one last merge, which is on
the list; and two neighbours that would join into a token have come about as they do in that token's own bytes, for
nothing outside has touched them yet; so they are that last merge.  Both are checked when a model is loaded, as is
the equality itself on texts that are known to be awkward; where anything differs the reference goes on alone, and
one line of the log says why.

Special tokens are cut out first, the leftmost and longest as the reference does.  Long texts go through in segments,
cut where a piece ends whatever stands on either side; a segment with no such place (a megabyte of one letter) goes
to the reference, so that no input can exhaust tiktoken's stack.  Knows nothing about prompts.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import structlog
import tiktoken
from tokenizers import AddedToken, Tokenizer, models, normalizers

from helix_gateway.text.awkward_texts import AWKWARD_TEXTS
from helix_gateway.text.definition import TokenizerDefinition
from helix_gateway.text.pretokenizers import as_one_pattern, piece_end
from helix_gateway.text.token_bytes import byte_level_alphabet, byte_level_bytes

_log = structlog.get_logger(__name__)

# tiktoken's expressions keep a stack entry for each character of white space, a million at most, and its older releases
# need quadratic time for one long piece; twice this length passes both in milliseconds.
_SEGMENT_CHARS = 16_384
_REMEMBERED_TEXTS, _REMEMBERED_CHARS = 256, 2000
"""Texts between two added tokens whose ids are kept, and how long they may be: what a chat template writes itself, and the
system's message, come again with each conversation."""
_Encode = Callable[[str], list[int]]


class _RefusalError(Exception):
    """Why a tokenizer has no fast path."""


class TiktokenFastPath:
    """The same ids as the reference, sooner; safe to call from any thread.

    Args:
        pattern: whose matches are the pieces that merging stays within.
        ranks: ids of the tokens that merging makes, by their bytes.
        added: ids of the added tokens, by their text.
        composes: whether text is brought to Unicode's form C first.
        reference: encodes what does not go through here.
    """

    def __init__(
        self,
        *,
        pattern: str,
        ranks: Mapping[bytes, int],
        added: Mapping[str, int],
        composes: bool,
        reference: _Encode,
    ) -> None:
        self._num_tokens = 1 + max([*ranks.values(), *added.values()])
        every_byte = _with_every_byte(ranks, self._num_tokens)
        encoding = tiktoken.Encoding("helix", pat_str=pattern, mergeable_ranks=every_byte, special_tokens={})
        self._encode_ordinary: _Encode = encoding.encode_ordinary
        self._added = added
        self._composes = composes
        self._reference = reference
        self._encode_again = lru_cache(maxsize=_REMEMBERED_TEXTS)(self._encode_plain)
        self._piece_end = piece_end(pattern)
        longest_first = sorted(added, key=len, reverse=True)
        self._added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; added tokens that are written out in it are those tokens."""
        if self._composes and not unicodedata.is_normalized("NFC", text):
            return self._reference(text)
        if self._added_pattern is None:
            return self._encode_plain(text)
        ids: list[int] = []
        for index, part in enumerate(self._added_pattern.split(text)):
            if index % 2:
                ids.append(self._added[part])
            elif len(part) <= _REMEMBERED_CHARS:
                ids += self._encode_again(part)
            else:
                ids += self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if len(text) <= _SEGMENT_CHARS:
            return self._encode_segment(text)
        return [token for segment in self._segments(text) for token in self._encode_segment(segment)]

    def _segments(self, text: str) -> Iterator[str]:
        """Cut a text where that changes nothing; each segment about as long as one should be, if it can."""
        start = 0
        while start < len(text):
            found = self._piece_end.search(text, start + _SEGMENT_CHARS)
            end = found.end() if found else len(text)
            yield text[start:end]
            start = end

    def _encode_segment(self, text: str) -> list[int]:
        if len(text) > 2 * _SEGMENT_CHARS:
            return self._reference(text)
        ids = self._encode_ordinary(text)
        # A byte without a token has a stand-in here; the reference has its own way with such bytes.
        return self._reference(text) if max(ids, default=0) >= self._num_tokens else ids


def find_fast_path(definition: TokenizerDefinition) -> TiktokenFastPath | None:
    """The fast path of a tokenizer; None, with a line in the log, where it has none."""
    try:
        path = _build(definition)
        _check_equality(path, definition.backend)
    except _RefusalError as refusal:
        _log.info("tiktoken fast path refused, the reference tokenizer encodes", reason=str(refusal))
        return None
    return path


def _build(definition: TokenizerDefinition) -> TiktokenFastPath:
    backend = definition.backend
    model = _plain_bpe(backend)
    pattern = as_one_pattern(backend.pre_tokenizer)
    if pattern is None:
        raise _RefusalError("its pre-tokenizer is not one that is known as a single expression")
    added = _added_tokens(backend)
    merged = _merged_tokens(backend, definition.merges or (), added)
    _check_tokens_merge(model, merged)
    return TiktokenFastPath(
        pattern=pattern,
        ranks={byte_level_bytes(text): index for text, index in merged.items()},
        added=added,
        composes=backend.normalizer is not None,
        reference=lambda text: backend.encode(text, add_special_tokens=False).ids,
    )


def _plain_bpe(backend: Tokenizer) -> models.BPE:
    """The model, if it merges bytes and does nothing else."""
    model = backend.model
    if not isinstance(model, models.BPE):
        raise _RefusalError(f"its model is {type(model).__name__}, not BPE")
    if model.dropout or model.byte_fallback or model.continuing_subword_prefix or model.end_of_word_suffix:
        raise _RefusalError("its BPE is not byte-level: it has dropout, byte fallback, a prefix or a suffix")
    if not isinstance(backend.normalizer, normalizers.NFC | None):
        raise _RefusalError(f"it normalizes text with {type(backend.normalizer).__name__}")
    return model


def _added_tokens(backend: Tokenizer) -> dict[str, int]:
    added = backend.get_added_tokens_decoder()
    for token in added.values():
        _check_plain(token, normalized_matters=backend.normalizer is not None)
    return {token.content: index for index, token in added.items() if token.content}


def _check_plain(token: AddedToken, *, normalized_matters: bool) -> None:
    if token.lstrip or token.rstrip or token.single_word or (token.normalized and normalized_matters):
        raise _RefusalError(f"its added token {token.content!r} is looked for in a way of its own")


def _merged_tokens(backend: Tokenizer, merges: Sequence[tuple[str, str]], added: Mapping[str, int]) -> dict[str, int]:
    """Ids of the single bytes and of every token that merging makes, by their text in the vocabulary's spelling."""
    vocab = backend.get_vocab(with_added_tokens=False)
    made = {left + right: vocab[left + right] for left, right in merges}
    if any(later < earlier for earlier, later in pairwise(vocab[left + right] for left, right in merges)):
        raise _RefusalError("the order of its merges is not the order of its ids")
    if not set(added.values()).isdisjoint(made.values()):
        raise _RefusalError("merging makes one of its added tokens")
    singles = {letter: vocab[letter] for letter in byte_level_alphabet().values() if letter in vocab}
    return {**singles, **made}


def _check_tokens_merge(model: models.BPE, tokens: Mapping[str, int]) -> None:
    """Each token's own bytes must merge into it, by merges alone."""
    whole_pieces_first = model.ignore_merges
    model.ignore_merges = False
    try:
        merged = Tokenizer(model).encode_batch_fast(list(tokens), add_special_tokens=False)
    finally:
        model.ignore_merges = whole_pieces_first
    for (text, index), encoding in zip(tokens.items(), merged, strict=True):
        if encoding.ids != [index]:
            raise _RefusalError(f"its token {text!r} is not what its own bytes merge into")


def _with_every_byte(ranks: Mapping[bytes, int], num_tokens: int) -> dict[bytes, int]:
    """Tiktoken wants a token for every byte: those without one get ids above all others."""
    missing = [bytes([byte]) for byte in range(0x100) if bytes([byte]) not in ranks]
    return {**ranks, **{byte: num_tokens + n for n, byte in enumerate(missing)}}


def _check_equality(path: TiktokenFastPath, backend: Tokenizer) -> None:
    specials = [token.content for token in backend.get_added_tokens_decoder().values()]
    texts = [*AWKWARD_TEXTS, "".join(specials), " x 1".join(specials)]
    expected = backend.encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding in zip(texts, expected, strict=True):
        if path.encode(text) != encoding.ids:
            raise _RefusalError(f"it gives other tokens than the reference for {text[:80]!r}")
