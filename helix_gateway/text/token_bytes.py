"""The bytes behind each token id, for tokenizers whose text is the bytes of their tokens, one after another.

So are byte-level BPE, where printable characters stand for bytes, and sentencepiece with byte fallback, where
``<0xE4>`` is a byte and U+2581 a space.  Then decoding is joining, and can be done token by token.  Knows nothing
about streams or UTF-8 sequences that several tokens share.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SPACE = "\u2581"
_ToBytes = Callable[[str], bytes]
_STRIP_ONE_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_FALLBACK_STEPS = [
    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def byte_level_alphabet() -> dict[int, str]:
    """Which character stands for each byte in a byte-level vocabulary (GPT-2's ``bytes_to_unicode``).

    Printable bytes stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = {ord(character): byte for byte, character in byte_level_alphabet().items()}
_ALPHABET = frozenset(byte_level_alphabet().values())


def byte_level_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; as UTF-8 where it has another character."""
    if _ALPHABET.issuperset(token):
        return token.translate(_BYTE_OF_CHARACTER).encode("latin-1")
    return token.encode()


def fallback_bytes(token: str) -> bytes:
    """The bytes that a token of a sentencepiece vocabulary stands for."""
    match = _BYTE_TOKEN.match(token)
    if match:
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE, " ").encode()


def _added_token_bytes(token: str) -> bytes:
    """An added token says what it says, whatever its characters would stand for in a byte-level vocabulary."""
    return token.encode()


class TokenBytes:
    """Bytes of every token, found when first asked for and kept; safe to share between threads.

    Args:
        backend: the reference tokenizer.
        of_token, of_added_token: the bytes that a token of the vocabulary, or an added one, stands for.
        strips_leading_space: whether the space that starts a whole text is the tokenizer's own, not the text's.
    """

    def __init__(
        self, backend: Tokenizer, *, of_token: _ToBytes, of_added_token: _ToBytes, strips_leading_space: bool = False
    ) -> None:
        self._backend = backend
        self._to_bytes = of_token
        self.strips_leading_space = strips_leading_space
        added = backend.get_added_tokens_decoder()
        self._bytes = {index: of_added_token(token.content) for index, token in added.items()}
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.fallback_ids = _fallback_ids(backend) if of_token is fallback_bytes else frozenset[int]()
        """Tokens that stand for a byte which no other token has, spelt ``<0xE4>``."""

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of one token; none for an id that no token has."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._look_up(token_id)
        return found

    def _look_up(self, token_id: int) -> bytes:
        token = find_token(self._backend, token_id)
        return b"" if token is None else self._to_bytes(token)


def _fallback_ids(backend: Tokenizer) -> frozenset[int]:
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(0x100)]
    return frozenset(index for index in ids if index is not None)


def find_token(backend: Tokenizer, token_id: int) -> str | None:
    """The token of an id in the vocabulary's own spelling; None where no token has that id."""
    # `tokenizers` takes 32 unsigned bits, and raises beyond them.
    return backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None


def find_token_bytes(backend: Tokenizer) -> TokenBytes | None:
    """The bytes of a tokenizer's tokens; None where its text is not simply their bytes in a row."""
    described: Mapping[str, Any] | None = json.loads(backend.decoder.__getstate__()) if backend.decoder else None
    match described:
        case {"type": "ByteLevel"}:
            return TokenBytes(backend, of_token=byte_level_bytes, of_added_token=_added_token_bytes)
        case {"type": "Sequence", "decoders": [*steps]} if steps == _FALLBACK_STEPS:
            return TokenBytes(backend, of_token=fallback_bytes, of_added_token=fallback_bytes)
        case {"type": "Sequence", "decoders": [*steps]} if steps == [*_FALLBACK_STEPS, _STRIP_ONE_SPACE]:
            return TokenBytes(
                backend, of_token=fallback_bytes, of_added_token=fallback_bytes, strips_leading_space=True
            )
    return None
