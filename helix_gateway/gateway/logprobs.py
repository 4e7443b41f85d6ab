"""Log-probabilities in the three forms that clients know: chat's, the legacy one, and prompt logprobs by token id.

Knows nothing about streams; a legacy writer keeps the text offset that a stream goes on from.
"""

from collections.abc import Sequence
from typing import cast

import msgspec

from helix_gateway.core.event import TokenLogprobs
from helix_gateway.gateway.chunks import to_json
from helix_gateway.gateway.schemas.answers import (
    ChosenTokenLogprob,
    LegacyLogprobLists,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
)
from helix_gateway.gateway.token_texts import TokenTexts

LOWEST = -9999.0
"""What OpenAI writes for a token of no probability; JSON has no infinity."""


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if logprob > LOWEST else LOWEST


def chat_logprobs(texts: TokenTexts, tokens: Sequence[TokenLogprobs]) -> list[ChosenTokenLogprob]:
    """The ``content`` of chat's ``logprobs``."""
    return [
        {
            **_chat_entry(texts, token.token_id, token.logprob),
            "top_logprobs": [
                _chat_entry(texts, token_id, logprob)
                for token_id, logprob in zip(token.top_ids, token.top_logprobs, strict=True)
            ],
        }
        for token in tokens
    ]


def _chat_entry(texts: TokenTexts, token_id: int, logprob: float) -> TokenLogprob:
    text = texts[token_id]
    return {"token": text.chat, "logprob": finite(logprob), "bytes": list(text.data)}


def prompt_logprobs(texts: TokenTexts, tokens: Sequence[TokenLogprobs | None], top: int) -> PromptLogprobs:
    """For each prompt token (null for the first) a map from token id: the token's own and the ``top`` likeliest.

    Each is JSON at once.  Freeing the maps of a long prompt all together keeps Python's lock for 15 ms.
    """
    written = [msgspec.Raw(to_json(None if token is None else _by_id(texts, token, top))) for token in tokens]
    return cast("PromptLogprobs", written)


def _by_id(texts: TokenTexts, token: TokenLogprobs, top: int) -> dict[str, PromptLogprob]:
    ranked = [(token.token_id, token.logprob, token.rank)]
    ranked += [
        (token_id, logprob, rank)
        for rank, (token_id, logprob) in enumerate(zip(token.top_ids, token.top_logprobs, strict=True), start=1)
        if rank <= top and token_id != token.token_id
    ]
    return {
        str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": texts[token_id].chat}
        for token_id, logprob, rank in ranked
    }


class LegacyLogprobs:
    """``logprobs`` of `/v1/completions` for one choice: parallel lists, with offsets into the choice's text."""

    def __init__(self, texts: TokenTexts, top: int) -> None:
        self._texts = texts
        self._top = top
        self._offset = 0
        """Characters begun so far."""

    def of_prompt(
        self, token_ids: Sequence[int], tokens: Sequence[TokenLogprobs | None], *, text: str
    ) -> LegacyLogprobLists:
        """The echoed prompt's; a first token that ``text`` does not show (a beginning mark) takes no room in it."""
        lists = self._lists()
        for place, (token_id, token) in enumerate(zip(token_ids, tokens, strict=True)):
            hidden = place == 0 and not text.startswith(self._texts[token_id].legacy)
            self._append(lists, token_id, token, width=0 if hidden else None)
        return lists

    def of_output(self, tokens: Sequence[TokenLogprobs]) -> LegacyLogprobLists:
        """The next output tokens'."""
        lists = self._lists()
        for token in tokens:
            self._append(lists, token.token_id, token)
        return lists

    @staticmethod
    def _lists() -> LegacyLogprobLists:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def _append(
        self, lists: LegacyLogprobLists, token_id: int, token: TokenLogprobs | None, width: int | None = None
    ) -> None:
        text = self._texts[token_id]
        lists["tokens"].append(text.legacy)
        lists["text_offset"].append(self._offset - 1 if text.starts_inside_character and self._offset else self._offset)
        lists["token_logprobs"].append(None if token is None else finite(token.logprob))
        lists["top_logprobs"].append(None if token is None else self._top_of(token))
        self._offset += text.num_characters_begun if width is None else width

    def _top_of(self, token: TokenLogprobs) -> dict[str, float]:
        pairs = list(zip(token.top_ids, token.top_logprobs, strict=True))[: self._top]
        if token.token_id not in token.top_ids[: self._top]:
            pairs.append((token.token_id, token.logprob))
        return {self._texts[token_id].legacy: finite(logprob) for token_id, logprob in pairs}


def joined(first: LegacyLogprobLists | None, second: LegacyLogprobLists | None) -> LegacyLogprobLists | None:
    """Two stretches of legacy logprobs as one; either may be missing."""
    if first is None or second is None:
        return first or second
    return {
        "tokens": first["tokens"] + second["tokens"],
        "token_logprobs": first["token_logprobs"] + second["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + second["top_logprobs"],
        "text_offset": first["text_offset"] + second["text_offset"],
    }
