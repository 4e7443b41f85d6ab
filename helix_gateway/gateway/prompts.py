"""From a request's messages or prompt to token ids that fit the context.

A prompt far too long is refused from a piece of it, so that megabytes of text are never tokenised to learn that
they do not fit; short prompts are tokenised where they stand, longer ones in a worker thread.  Knows nothing
about sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import web

from helix_gateway.core.errors import ContextLengthError, InvalidRequestError
from helix_gateway.gateway.body import read_json
from helix_gateway.gateway.envelope import read_value
from helix_gateway.gateway.errors import ApiError, kind_of
from helix_gateway.gateway.registry import ServedModel
from helix_gateway.gateway.schemas.chat import ChatMessage, TextMessage
from helix_gateway.gateway.schemas.completions import MAX_PROMPTS
from helix_gateway.gateway.schemas.content import Prediction
from helix_gateway.gateway.state import INLINE_SIZE, sized

MAX_PROMPT_IDS = 1024 * 1024
"""Token ids over all prompts of one request."""
SUSPECT_BYTES_PER_TOKEN = 8
"""A prompt of more bytes than this for each token of the context hardly fits: it is tokenised in part first."""
CHARACTERS_PER_MESSAGE = 50
"""A message costs the template as much as so many characters cost the tokenizer, however short it is."""
TRIAL_SLACK_TOKENS = 64
"""Tokens that cutting a text may add at the cut, generously."""


Messages = Sequence[ChatMessage] | Sequence[TextMessage]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the model sees it, and as the client wrote it."""

    token_ids: list[int]
    text: str | None
    """None where the client gave token ids."""


async def chat_prompt(request: web.Request, served: ServedModel, messages: Messages) -> Prompt:
    """Render and tokenise a conversation.

    Raises:
        InvalidRequestError: the template refuses it, the model has none, or it does not fit the context.
    """
    size = CHARACTERS_PER_MESSAGE * len(messages)
    if size <= INLINE_SIZE:
        size += sum(len(text) for message in messages for text in message.texts)
    return await sized(request, size, _encode_chat, served, messages)


def _encode_chat(served: ServedModel, messages: Messages) -> Prompt:
    tokenizer = served.service.tokenizer
    texts = [text for message in messages for text in message.texts]
    _refuse_hopeless(served, texts, "messages")
    text = tokenizer.render_chat([message.for_template() for message in messages])
    token_ids = encode_bounded(served, text, "messages", add_special_tokens=False)
    return Prompt(_fitting(served, token_ids, "messages"), text)


async def predicted_tokens(request: web.Request, served: ServedModel, prediction: Prediction | None) -> list[int]:
    """Tokenise what the client expects the answer to be; what the context could not hold anyway is left out."""
    if prediction is None:
        return []
    text = prediction.text
    return await sized(request, len(text), _encode_prediction, served, text)


def _encode_prediction(served: ServedModel, text: str) -> list[int]:
    limit = served.service.max_model_len
    token_ids = served.service.tokenizer.encode(text[: limit * SUSPECT_BYTES_PER_TOKEN], add_special_tokens=False)
    return token_ids[:limit]


async def completion_prompts(
    request: web.Request, served: ServedModel, raw: bytes, *, add_special_tokens: bool
) -> list[Prompt]:
    """Read and tokenise the `prompt` field.

    Raises:
        ApiError, InvalidRequestError: 400.
    """
    encode = partial(_encode_prompts, served, raw, add_special_tokens=add_special_tokens)
    return await sized(request, len(raw), encode)


async def single_prompt(request: web.Request, served: ServedModel, raw: bytes, *, add_special_tokens: bool) -> Prompt:
    """The same of a `prompt` field that holds one prompt: a string or token ids.

    Raises:
        ApiError, InvalidRequestError: 400.
    """
    encode = partial(_encode_prompt, served, raw, add_special_tokens=add_special_tokens)
    return await sized(request, len(raw), encode)


def _encode_prompt(served: ServedModel, raw: bytes, *, add_special_tokens: bool) -> Prompt:
    _refuse_too_many_ids(served, raw)
    value = read_json(raw, read_value, "prompt")
    if isinstance(value, str):
        return _text_prompt(served, value, "prompt", add_special_tokens=add_special_tokens)
    if isinstance(value, list):
        return _ids_prompt(served, value, "prompt")
    raise _wrong("prompt", f"must be a string or an array of token ids, not {kind_of(value)}")


def _encode_prompts(served: ServedModel, raw: bytes, *, add_special_tokens: bool) -> list[Prompt]:
    _refuse_too_many_ids(served, raw)
    value = _read_prompts(raw)
    if isinstance(value, str):
        return [_text_prompt(served, value, "prompt", add_special_tokens=add_special_tokens)]
    if not isinstance(value, list):
        raise _wrong("prompt", f"must be a string, an array of strings, or token ids, not {kind_of(value)}")
    if not value:
        raise _wrong("prompt", "must not be empty")
    if type(value[0]) is int:
        return [_ids_prompt(served, value, "prompt")]
    if len(value) > MAX_PROMPTS:
        raise _wrong("prompt", f"must have at most {MAX_PROMPTS} prompts; it has {len(value)}")
    return [_one_of_many(served, value, index, add_special_tokens=add_special_tokens) for index in range(len(value))]


def _read_prompts(raw: bytes) -> Any:
    """The field as Python has it; prompts of numbers one by one, for a million numbers in one call keep Python's lock."""
    if raw[:1] != b"[" or b'"' in raw or raw.find(b"[", 1) < 0:
        return read_json(raw, read_value, "prompt")
    rows: list[Any] = []
    start = 1
    while (end := raw.find(b"]", start)) >= 0 and raw.count(b"[", start, end) == 1:
        begin = raw.index(b"[", start, end)
        if raw[start:begin].strip(b", \t\r\n"):
            break
        rows.append(read_json(raw[begin : end + 1], read_value, f"prompt[{len(rows)}]"))
        start = end + 1
    # Anything else than rows of numbers stands between or behind them.
    return rows if raw[start:].strip() == b"]" else read_json(raw, read_value, "prompt")


def _one_of_many(served: ServedModel, values: list[Any], index: int, *, add_special_tokens: bool) -> Prompt:
    value, path = values[index], f"prompt[{index}]"
    if type(value) is not type(values[0]):
        raise _wrong(path, f"must be {kind_of(values[0])} as the first prompt is, not {kind_of(value)}")
    if isinstance(value, str):
        return _text_prompt(served, value, path, add_special_tokens=add_special_tokens)
    if isinstance(value, list):
        return _ids_prompt(served, value, path)
    raise _wrong(path, f"must be a string or an array of token ids, not {kind_of(value)}")


def _text_prompt(served: ServedModel, text: str, path: str, *, add_special_tokens: bool) -> Prompt:
    _refuse_hopeless(served, [text], path)
    token_ids = encode_bounded(served, text, path, add_special_tokens=add_special_tokens)
    if not token_ids:
        bos = served.service.tokenizer.bos_token_id
        if bos is None:
            raise _wrong(path, "must not be empty: this model has no token to begin with")
        token_ids = [bos]
    return Prompt(_fitting(served, token_ids, path), text)


def _ids_prompt(served: ServedModel, token_ids: list[Any], path: str) -> Prompt:
    if not token_ids:
        raise _wrong(path, "must not be empty")
    if set(map(type, token_ids)) != {int}:
        place, value = next((i, value) for i, value in enumerate(token_ids) if type(value) is not int)
        raise _wrong(f"{path}[{place}]", f"must be a token id, not {kind_of(value)}")
    vocab_size = served.service.vocab_size
    if not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        place = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < vocab_size)
        raise _wrong(f"{path}[{place}]", f"must be a token id from 0 to {vocab_size - 1}")
    return Prompt(_fitting(served, token_ids, path), None)


def encode_bounded(served: ServedModel, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
    """Tokenise ``text``, or a piece of it where that is enough to see that it does not fit.

    Raises:
        InvalidRequestError: ``context_length_exceeded``.
    """
    encode, limit = served.service.tokenizer.encode, served.service.max_model_len
    if len(text) * 4 > limit * SUSPECT_BYTES_PER_TOKEN and len(text.encode()) > limit * SUSPECT_BYTES_PER_TOKEN:
        trial = limit
        while trial < len(text):
            at_least = len(encode(text[:trial], add_special_tokens=False)) - TRIAL_SLACK_TOKENS
            if at_least >= limit:
                raise _at_least(at_least, limit, param)
            trial *= 2
    return encode(text, add_special_tokens=add_special_tokens)


def _refuse_hopeless(served: ServedModel, texts: Sequence[str], param: str) -> None:
    """Without tokenising anything: no token is longer than the longest."""
    limit = served.service.max_model_len
    if sum(map(len, texts)) <= limit * SUSPECT_BYTES_PER_TOKEN:
        return
    at_least = sum(map(served.service.tokenizer.least_tokens, texts))
    if at_least >= limit:
        raise _at_least(at_least, limit, param)


def _refuse_too_many_ids(served: ServedModel, raw: bytes) -> None:
    """Without reading them: an array of numbers has one more than it has commas."""
    if raw[:1] != b"[" or b'"' in raw:
        return
    limit = served.service.max_model_len
    if raw.find(b"[", 1) < 0:
        if (num_ids := _count_past(raw, b",", limit)) >= limit:
            raise _at_least(num_ids, limit, "prompt")
    elif _count_past(raw, b"[", MAX_PROMPTS + 1) > MAX_PROMPTS + 1:
        raise _wrong("prompt", f"must have at most {MAX_PROMPTS} prompts")
    elif _count_past(raw, b",", MAX_PROMPT_IDS) > MAX_PROMPT_IDS:
        raise _wrong("prompt", f"must have at most {MAX_PROMPT_IDS} token ids over all prompts")


def _count_past(raw: bytes, mark: bytes, most: int) -> int:
    """How often ``mark`` stands in ``raw``; stops counting a little past ``most``."""
    count = 0
    for start in range(0, len(raw), 4096):
        count += raw.count(mark, start, start + 4096)
        if count > most:
            break
    return count


def _fitting(served: ServedModel, token_ids: list[int], param: str) -> list[int]:
    limit = served.service.max_model_len
    if len(token_ids) >= limit:
        raise ContextLengthError(len(token_ids), limit, param=param)
    return token_ids


def _at_least(num_tokens: int, limit: int, param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"This model's maximum context length is {limit} tokens, but the prompt has at least {num_tokens} tokens. "
        "Shorten the prompt.",
        param=param,
        code="context_length_exceeded",
    )


def _wrong(path: str, problem: str) -> ApiError:
    return ApiError.bad_request(f"`{path}` {problem}.", param=path)
