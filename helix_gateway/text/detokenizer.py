"""Turns the tokens of one sequence into text as they come, never half a character.

What the pieces join to is what decoding all the tokens at once gives.  Two ways: where a tokenizer's text is the
bytes of its tokens (`TokenBytes`: all that matter today), those bytes run through an incremental UTF-8 decoder, at a
constant cost a token; for any other, `tokenizers`' own DecodeStream.  Knows nothing about stop strings or about who
reads.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from helix_gateway.text.token_bytes import TokenBytes, find_token

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """The text of one sequence of tokens; holds that sequence's state."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; answer the text that is certain by now.

        Ids that no token has say nothing.  How the tokens are grouped into calls makes no difference to the text.
        """

    def flush(self) -> str:
        """The text that was still held back, when no token will follow: U+FFFD for half a character."""


class ByteDetokenizer:
    """Joins tokens' bytes; invalid UTF-8 becomes U+FFFD as the Unicode standard recommends (maximal subparts)."""

    def __init__(self, token_bytes: TokenBytes, *, skip_special_tokens: bool) -> None:
        self._bytes = token_bytes
        self._skipped: frozenset[int] = token_bytes.special_ids if skip_special_tokens else frozenset()
        self._decoder = _Utf8Decoder(errors="replace")
        self._at_start = token_bytes.strips_leading_space

    def feed(self, token_ids: Sequence[int]) -> str:
        """As `Detokenizer.feed`."""
        joined = b"".join([self._bytes[token] for token in token_ids if token not in self._skipped])
        return self._without_leading_space(self._decoder.decode(joined))

    def flush(self) -> str:
        """As `Detokenizer.flush`."""
        return self._without_leading_space(self._decoder.decode(b"", final=True))

    def _without_leading_space(self, text: str) -> str:
        if not self._at_start or not text:
            return text
        self._at_start = False
        return text.removeprefix(" ")


class WindowDetokenizer:
    """Decodes a sliding window of tokens through `tokenizers`, for decoders that look at their neighbours."""

    def __init__(self, backend: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._all: list[int] = []
        self._sent = ""

    def feed(self, token_ids: Sequence[int]) -> str:
        """As `Detokenizer.feed`."""
        return "".join([self._step(token) for token in token_ids])

    def _step(self, token_id: int) -> str:
        if find_token(self._backend, token_id) is None:
            return ""
        self._all.append(token_id)
        piece = self._stream.step(self._backend, token_id) or ""
        self._sent += piece
        return piece

    def flush(self) -> str:
        """As `Detokenizer.flush`."""
        whole = self._backend.decode(self._all, skip_special_tokens=self._skip)
        return whole.removeprefix(self._sent) if whole.startswith(self._sent) else ""
