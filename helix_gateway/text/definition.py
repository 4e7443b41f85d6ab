"""What a loader found out about one model's tokenizer, wherever it was read from, and the words for it; no behaviour."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from tokenizers import Tokenizer

Merges = list[tuple[str, str]]


class TokenType(IntEnum):
    """What a token is for, in sentencepiece's numbering, which GGUF took over."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class TokenizerDefinition:
    """The reference tokenizer, and what it does not know about itself."""

    backend: Tokenizer
    """The reference: what the other paths are held to."""
    merges: Sequence[tuple[str, str]] | None
    """Merges of a BPE in their order, in the vocabulary's own spelling; None for another model."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Every token that ends an answer, the tokenizer's own first."""
    special_tokens: Mapping[str, str]
    """Texts by the names under which a chat template asks for them (``bos_token``, ``eos_token``)."""
    chat_template: str | None
