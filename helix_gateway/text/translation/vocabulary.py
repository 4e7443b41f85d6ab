"""One tokenizer as a translation sees it: the bytes of its tokens, tokens by their bytes, and tokens of any bytes.

Text that goes through `ByteEncoder` may be torn anywhere, even in the middle of a character, and may be no text at all:
what the tokenizer itself cannot encode without changing it is spelt with the longest tokens that fit.  Knows nothing
about a second vocabulary.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import accumulate

from helix_gateway.text.token_bytes import TokenBytes
from helix_gateway.text.tokenizer import Tokenizer

_NO_TEXT = re.compile("[\udc80-\udcff]+")
"""How bytes that are no UTF-8 come out of Python's ``surrogateescape``."""
_LONGEST_CHARACTER_BYTES = 4
_LONGEST_SPELT_BYTES = 16
"""Longer tokens are not tried for what is no text: a prompt of 100,000 such bytes is to cost tenths of a second."""


class Vocabulary:
    """The tokens of one tokenizer.

    Args:
        tokenizer: whose text is the bytes of its tokens.
        table: those bytes.
    """

    def __init__(self, tokenizer: Tokenizer, table: TokenBytes) -> None:
        self.encode = tokenizer.encode
        self.bytes_of = [table[index] for index in range(tokenizer.vocab_size)]
        """By id; empty for an id that no token has."""
        self.special_ids = table.special_ids
        self.end_ids = tokenizer.eos_token_ids
        """Every token that ends an answer, the tokenizer's own first."""
        self.bos_token_id = tokenizer.bos_token_id
        self.prompt_prefix = tokenizer.prompt_prefix
        self.strips_leading_space = table.strips_leading_space
        self.by_bytes = _by_bytes(self.bytes_of, table.special_ids, table.fallback_ids)
        """Tokens that are text, by their bytes."""
        self._longest_spelt_bytes = min(_LONGEST_SPELT_BYTES, max(map(len, self.by_bytes), default=0))

    def __len__(self) -> int:
        return len(self.bytes_of)

    def spell(self, data: bytes, start: int, stop: int) -> tuple[list[int], list[int]]:
        """Tokens of ``data[start:stop]``, the longest in reason that fits each time, and where in ``data`` each ends.

        A byte that no token has is left out: then the next token ends farther behind the one before than it is long.
        """
        ids: list[int] = []
        ends: list[int] = []
        while start < stop:
            for size in range(min(self._longest_spelt_bytes, stop - start), 0, -1):
                token = self.by_bytes.get(data[start : start + size])
                if token is not None:
                    ids.append(token)
                    ends.append(start + size)
                    start += size
                    break
            else:
                start += 1
        return ids, ends


class ByteEncoder:
    """Tokens of bytes, as the tokenizer itself makes them wherever the bytes are text.

    Args:
        vocabulary: in whose tokens.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def encode(self, data: bytes) -> tuple[list[int], list[int]]:
        """Token ids, and where in ``data`` each of them ends.

        A space of its own that the tokenizer writes before a text is part of its token, but has no bytes in ``data``.
        """
        ids: list[int] = []
        ends: list[int] = []
        for start, stop, text in _stretches(data):
            more_ids, more_ends = self._encode(data, start, stop, text)
            if start:
                more_ids, more_ends = self._without_own_space(data, start, more_ids, more_ends)
            ids += more_ids
            ends += more_ends
        return ids, ends

    def encode_behind(self, data: bytes) -> tuple[list[int], list[int]]:
        """As `encode`, for bytes that other text stands before: no token has a space that is not theirs."""
        ids, ends = self.encode(data)
        return self._without_own_space(data, 0, ids, ends)

    def _without_own_space(
        self, data: bytes, start: int, ids: list[int], ends: list[int]
    ) -> tuple[list[int], list[int]]:
        if not ids or len(self._vocabulary.bytes_of[ids[0]]) <= ends[0] - start:
            return ids, ends
        first_ids, first_ends = self._vocabulary.spell(data, start, ends[0])
        return first_ids + ids[1:], first_ends + ends[1:]

    def _encode(self, data: bytes, start: int, stop: int, text: str | None) -> tuple[list[int], list[int]]:
        if text is None:
            return self._vocabulary.spell(data, start, stop)
        ids = self._vocabulary.encode(text, add_special_tokens=False)
        pieces = [self._vocabulary.bytes_of[token] for token in ids]
        ends = list(accumulate(map(len, pieces), initial=start))[1:]
        if b"".join(pieces) != data[start:stop]:
            ends = _ends_of_changed(self._vocabulary.by_bytes, data, start, stop, pieces)
            del ids[len(ends) :]
        at = ends[-1] if ends else start
        if at < stop:
            spelt_ids, spelt_ends = self._vocabulary.spell(data, at, stop)
            ids += spelt_ids
            ends += spelt_ends
        return ids, ends


def _ends_of_changed(
    by_bytes: Mapping[bytes, int], data: bytes, start: int, stop: int, pieces: list[bytes]
) -> list[int]:
    """Where in ``data[start:stop]`` its tokens end, as far as they say what stands there.

    But for spaces of the tokenizer's own, and for bytes that have no token, which it leaves out.
    """
    if pieces and pieces[0].startswith(b" ") and sum(map(len, pieces)) > stop - start:
        pieces = [pieces[0][1:], *pieces[1:]]
    ends: list[int] = []
    at = start
    for index, piece in enumerate(pieces):
        while at < stop and not data.startswith(piece, at) and data[at : at + 1] not in by_bytes:
            at += 1
        if data.startswith(piece, at) and (piece or not index):
            at += len(piece)
        elif piece.startswith(b" ") and data.startswith(piece[1:], at):
            at += len(piece) - 1
        else:
            break
        ends.append(at)
    return ends


def complete_bytes(data: bytes) -> int:
    """How many of the bytes there are without the beginning of a character that is still to be completed."""
    for size in range(1, min(_LONGEST_CHARACTER_BYTES, len(data)) + 1):
        if starts_character(data, len(data) - size):
            return len(data) - size if size < _character_bytes(data[-size]) else len(data)
    return len(data)


def starts_character(data: bytes | bytearray, at: int) -> bool:
    """Whether no character of a UTF-8 text is torn by a cut here."""
    return at >= len(data) or data[at] & 0b1100_0000 != 0b1000_0000


def _character_bytes(first: int) -> int:
    """How long a character is that begins with this byte."""
    return 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)


def _stretches(data: bytes) -> Iterator[tuple[int, int, str | None]]:
    """Where text, and what is no text, begin and end, with the text."""
    decoded = data.decode("utf-8", errors="surrogateescape")
    start = at = 0
    for match in _NO_TEXT.finditer(decoded):
        text = decoded[at : match.start()]
        stop = start + len(text.encode())
        if text:
            yield start, stop, text
        start, at = stop + len(match[0]), match.end()
        yield stop, start, None
    if at < len(decoded):
        yield start, len(data), decoded[at:]


def _by_bytes(bytes_of: list[bytes], special_ids: frozenset[int], fallback_ids: frozenset[int]) -> dict[bytes, int]:
    """A byte that has a token of its own and a fallback is meant by the former."""
    found: dict[bytes, int] = {}
    for fallbacks in (False, True):
        for index, piece in enumerate(bytes_of):
            if piece and index not in special_ids and (index in fallback_ids) is fallbacks:
                found.setdefault(piece, index)
    return found
