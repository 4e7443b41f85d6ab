"""Tells a backend which of its tokens are found in plain text as they stand, and what it writes around a prompt."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, processors

from helix_gateway.text.definition import TokenType

_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)


def add_tokens_by_type(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control and unknown tokens are special (left out of text), user-defined ones are found but are text.

    Raises:
        ValueError: there are not as many types as tokens.
    """
    backend.add_tokens(
        [
            AddedToken(text, special=kind in _SPECIAL, normalized=False)
            for text, kind in zip(tokens, types, strict=True)
            if kind in _SPECIAL or kind == TokenType.USER_DEFINED
        ]
    )


def write_around_prompts(backend: Tokenizer, before: Sequence[int], after: Sequence[int]) -> None:
    """Have the backend write these tokens before and behind a prompt, where it is asked for special tokens."""
    if not before and not after:
        return
    names = {index: f"token {index}" for index in (*before, *after)}
    pieces = [{"id": name, "ids": [index], "tokens": [backend.id_to_token(index)]} for index, name in names.items()]
    template = [*(f"{names[index]}:0" for index in before), "$A:0", *(f"{names[index]}:0" for index in after)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=pieces)
