"""The tokenizer of one model, for whoever turns text into tokens and back: gateway, service and engine process alike.

It puts together what the other files of this room do: reading it from a GGUF file or a Hugging Face folder, the fast
path, chat templates, detokenisers, stop strings.  Safe to call from any thread.  Knows nothing about requests, HTTP
or models.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_letters
from threading import Lock
from typing import Any

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.text.chat_template import ChatTemplate, Message, no_chat_template, plain_messages
from helix_gateway.text.definition import TokenizerDefinition
from helix_gateway.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from helix_gateway.text.encodable import check_encodable
from helix_gateway.text.gguf_tokenizer import load_gguf_tokenizer
from helix_gateway.text.huggingface_tokenizer import load_huggingface_tokenizer
from helix_gateway.text.stop_strings import StopStringCondition
from helix_gateway.text.tiktoken_fast_path import TiktokenFastPath, find_fast_path
from helix_gateway.text.token_bytes import TokenBytes, find_token_bytes

# No token's text is long enough that more of them could decide where the next text begins.
_CONTEXT_TOKENS = 8


class Tokenizer:
    """Tokens and text of one model."""

    def __init__(self, definition: TokenizerDefinition) -> None:
        self._backend = definition.backend
        self._token_bytes: TokenBytes | None = find_token_bytes(definition.backend)
        self._unproven: TokenizerDefinition | None = definition
        """Until somebody encodes."""
        self._proven_fast_path: TiktokenFastPath | None = None
        self._proof = Lock()
        self._template = (
            ChatTemplate(definition.chat_template, definition.special_tokens)
            if definition.chat_template is not None
            else None
        )
        self.bos_token_id = definition.bos_token_id
        self.eos_token_ids = definition.eos_token_ids
        """Every token that ends an answer."""
        vocab = definition.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        """Ids of tokens are below this (the model may have more rows than that)."""
        self._longest_token_bytes = max((len(text.encode()) for text in vocab), default=1)
        self._prefix, self._suffix = _surrounding_ids(definition)

    @staticmethod
    def load(path: str) -> "Tokenizer":
        """Read the tokenizer of a local model: a GGUF file, or a folder in Hugging Face layout.

        Raises:
            ModelLoadError: there is none, it cannot be read, or it is of a kind that is not served.
        """
        place = Path(path)
        if place.is_dir():
            return Tokenizer(load_huggingface_tokenizer(path))
        if place.is_file():
            return Tokenizer(load_gguf_tokenizer(path))
        raise ModelLoadError(f"There is no model at {path}.")

    @property
    def has_fast_path(self) -> bool:
        """Whether tiktoken encodes, rather than the reference."""
        return self._fast_path is not None

    @property
    def _fast_path(self) -> TiktokenFastPath | None:
        # Proving it takes the better part of a second, and whoever only decodes never needs it.
        if self._unproven is not None:
            with self._proof:
                if self._unproven is not None:
                    self._proven_fast_path = find_fast_path(self._unproven)
                    self._unproven = None
        return self._proven_fast_path

    @property
    def token_bytes_table(self) -> TokenBytes | None:
        """The bytes of every token; None where a text is not simply its tokens' bytes in a row."""
        return self._token_bytes

    @property
    def prompt_prefix(self) -> tuple[int, ...]:
        """What `encode` writes before a prompt: BOS, or nothing."""
        return self._prefix

    def ids_by_spelling(self) -> dict[str, int]:
        """Every token with its id, in the vocabulary's own spelling."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """The model's template, in Jinja; None for a model that does not chat."""
        return None if self._template is None else self._template.source

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens that are written out in it are those tokens.

        Args:
            text: any text without lone surrogates.
            add_special_tokens: write BOS (and EOS) around it where this tokenizer does so.  A text that begins with
                BOS already, as what a chat template writes often does, is not given a second.

        Raises:
            InvalidRequestError: the text holds a lone surrogate.
        """
        check_encodable(text)
        fast = self._fast_path
        ids = fast.encode(text) if fast is not None else self._backend.encode(text, add_special_tokens=False).ids
        return self._surrounded(ids) if add_special_tokens else ids

    def _surrounded(self, ids: list[int]) -> list[int]:
        prefix = () if self._prefix and tuple(ids[: len(self._prefix)]) == self._prefix else self._prefix
        return [*prefix, *ids, *self._suffix] if prefix or self._suffix else ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of some tokens: what a detokenizer's pieces join to."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.feed(token_ids) + detokenizer.flush()

    def detokenizer(self, *, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> Detokenizer:
        """A fresh detokenizer for one sequence.

        Args:
            skip_special_tokens: leave special tokens out of the text.
            after: tokens that the sequence goes on from (the prompt's), where its text should join on to theirs:
                then a leading space is the text's own, and half a character is completed.
        """
        if self._token_bytes is not None:
            made: Detokenizer = ByteDetokenizer(self._token_bytes, skip_special_tokens=skip_special_tokens)
        else:
            made = WindowDetokenizer(self._backend, skip_special_tokens=skip_special_tokens)
        made.feed(after[-_CONTEXT_TOKENS:])
        return made

    def stop_condition(
        self, strings: Sequence[str], *, skip_special_tokens: bool = True, after: Sequence[int] = ()
    ) -> StopStringCondition:
        """A stop condition for one sequence, reading the text that `detokenizer` with the same arguments makes."""
        return StopStringCondition(strings, self.detokenizer(skip_special_tokens=skip_special_tokens, after=after))

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, perhaps only a part of a character; none for an id that no token has."""
        if self._token_bytes is not None:
            return self._token_bytes[token_id]
        return self.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself, U+FFFD where its bytes are only a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def least_tokens(self, text: str) -> int:
        """A number of tokens that the text has at least, found without encoding it.

        For refusing at once what is far too long: no token is longer than the longest.
        """
        return len(text.encode("utf-8", errors="surrogatepass")) // self._longest_token_bytes

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation, as OpenAI's messages, as the text of one prompt.

        Encode it with ``add_special_tokens=False``: the template writes what belongs there.

        Raises:
            InvalidRequestError: the model has no template, the template refuses the messages, or a content is
                neither text nor parts of text.
        """
        if self._template is None:
            raise no_chat_template()
        plain = plain_messages(messages)
        return self._template.render(
            plain, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )


def _surrounding_ids(definition: TokenizerDefinition) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the reference writes before and behind a prompt."""
    backend = definition.backend
    bare = backend.encode(ascii_letters, add_special_tokens=False).ids
    full = backend.encode(ascii_letters, add_special_tokens=True).ids
    start = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
    return tuple(full[:start]), tuple(full[start + len(bare) :])
