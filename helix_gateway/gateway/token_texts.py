"""What single tokens look like in JSON: needed for logprobs, and remembered since the same few come again.

Knows nothing about requests.
"""

from dataclasses import dataclass

from helix_gateway.service.api import ModelService


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token: its bytes, and the two ways in which OpenAI writes bytes that are no whole characters."""

    data: bytes
    chat: str
    legacy: str

    @property
    def starts_inside_character(self) -> bool:
        """Whether its first byte goes on with a character that an earlier token began."""
        return bool(self.data) and _is_continuation(self.data[0])

    @property
    def num_characters_begun(self) -> int:
        """How many characters begin in it."""
        return sum(not _is_continuation(byte) for byte in self.data)


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def token_text(data: bytes) -> TokenText:
    r"""How bytes are written: as text where they are whole characters, as ``\xf0`` escapes where not."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        escaped = "".join(f"\\x{byte:02x}" for byte in data)
        return TokenText(data, escaped, "bytes:" + escaped)
    return TokenText(data, text, text)


class TokenTexts:
    """The tokens of one model, each looked up once."""

    def __init__(self, service: ModelService) -> None:
        self._service = service
        self._known: dict[int, TokenText] = {}

    def __getitem__(self, token_id: int) -> TokenText:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = token_text(self._service.tokenizer.token_bytes(token_id))
        return known
