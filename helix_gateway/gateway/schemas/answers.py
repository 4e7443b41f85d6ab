"""What every route answers, as types: mypy holds the code to them, `openapi.py` writes them down for clients.

TypedDicts, so that an answer is an ordinary dict and costs nothing to check while serving; what chat and completions
stream is put together as bytes (`chunks.py`) and held to these types by tests.  Knows nothing about how answers come
about.
"""

from typing import Literal

from pydantic import ConfigDict, with_config
from typing_extensions import NotRequired, TypedDict

answer = with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))

FinishReason = Literal["stop", "length"]

# ---- what several share --------------------------------------------------------------------------------------


@answer
class PromptTokensDetails(TypedDict):
    """Of the prompt's tokens."""

    cached_tokens: int
    """Whose keys and values were found in the cache and not computed."""


@answer
class CompletionTokensDetails(TypedDict):
    """Of the generated tokens."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


@answer
class Usage(TypedDict):
    """Tokens of a request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


@answer
class PromptLogprob(TypedDict):
    """One token at one place of the prompt."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    decoded_token: str


@answer
class TokenLogprob(TypedDict):
    """One token and its log-probability, before temperature, bias and penalties."""

    token: str
    logprob: float
    bytes: list[int]
    """The token's own bytes: a token may be part of a character."""


@answer
class ChosenTokenLogprob(TokenLogprob):
    """A generated token and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


PromptLogprobs = list[dict[str, PromptLogprob] | None]


@answer
class AboutPrompt(TypedDict):
    """What was asked about the prompt."""

    prompt_token_ids: NotRequired[list[int]]
    """With `return_token_ids`."""
    prompt_logprobs: NotRequired[PromptLogprobs]
    """With `prompt_logprobs`: for each token of the prompt (null for the first) a map by token id."""


@answer
class Identity(TypedDict):
    """What opens every answer of OpenAI's, the same in each chunk of a stream."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str


# ---- chat ----------------------------------------------------------------------------------------------------


@answer
class ChatLogprobs(TypedDict):
    """With `logprobs`: an entry a token."""

    content: list[ChosenTokenLogprob]
    refusal: None


@answer
class AssistantMessage(TypedDict):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None
    annotations: list[None]
    """Always empty."""


@answer
class ChatChoice(TypedDict):
    """One answer of `n`."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: NotRequired[int | str]
    """The stop string or the id of the stop token that ended it."""
    token_ids: NotRequired[list[int]]
    """With `return_token_ids`."""


@answer
class ChatCompletion(Identity, AboutPrompt):
    """An answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


@answer
class ChatDelta(TypedDict):
    """What is new: the role once a choice, then text."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


@answer
class ChatChunkChoice(TypedDict):
    """What is new of one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    """Of each choice exactly one chunk has it, the last."""
    stop_reason: NotRequired[int | str]
    token_ids: NotRequired[list[int]]


@answer
class ChatCompletionChunk(Identity, AboutPrompt):
    """One event of a chat stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    """One, or none in the chunk that tells the usage."""
    usage: NotRequired[Usage | None]
    """With `stream_options.include_usage`: null until the last chunk."""


# ---- completions ---------------------------------------------------------------------------------------------


@answer
class LegacyLogprobLists(TypedDict):
    """With `logprobs`: lists of one length, an entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@answer
class CompletionChoice(AboutPrompt):
    """One text; prompt i of several has the choices from i * n on."""

    index: int
    text: str
    logprobs: LegacyLogprobLists | None
    finish_reason: FinishReason
    stop_reason: NotRequired[int | str]
    """The stop string or the id of the stop token that ended it."""
    token_ids: NotRequired[list[int]]
    """With `return_token_ids`."""


@answer
class Completion(Identity):
    """Texts that go on from the prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


@answer
class CompletionChunkChoice(AboutPrompt):
    """What is new of one text."""

    index: int
    text: str
    logprobs: LegacyLogprobLists | None
    finish_reason: FinishReason | None
    """Of each choice exactly one chunk has it, the last."""
    stop_reason: NotRequired[int | str]
    token_ids: NotRequired[list[int]]


@answer
class CompletionChunk(Identity):
    """One event of a completions stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    """One, or none in the chunk that tells the usage."""
    usage: NotRequired[Usage | None]
    """With `stream_options.include_usage`: null until the last chunk."""


# ---- generate ------------------------------------------------------------------------------------------------


@answer
class GenerateMetrics(TypedDict):
    """How an answer was made; times are seconds from the request's arrival at the engine."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values were found in the cache and not computed."""
    draft_tokens: int
    """Tokens that speculation proposed."""
    accepted_tokens: int
    """Proposed tokens that were what the model would have said."""
    preemptions: int
    """How often the answer gave its memory to others and was computed anew."""
    queue_time_s: float
    """Until the first step that computed something of it."""
    time_to_first_token_s: float | None
    """Until the first token was committed; null if there was none."""
    generation_time_s: float | None
    """Until the last token was committed; null if there was none."""
    tokens_per_second: float | None
    """After the first step; null where one step made all."""


@answer
class OutputLogprobs(TypedDict):
    """What was asked about the generated tokens."""

    logprobs: NotRequired[list[ChosenTokenLogprob]]
    """With `logprobs`: an entry a token."""


@answer
class GenerateAnswer(AboutPrompt, OutputLogprobs):
    """One text and how it was made."""

    id: str
    model: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None
    """The stop string or the id of the stop token that ended it."""
    metrics: GenerateMetrics


@answer
class GenerateEvent(AboutPrompt, OutputLogprobs):
    """What one step of the engine added."""

    id: str
    model: str
    text: str
    """May be empty: what could still become a stop string, and half a character, come with a later event."""
    token_ids: list[int]
    finish_reason: FinishReason | None
    """Set in the last event."""
    stop_reason: NotRequired[int | str | None]
    """In the last event."""
    metrics: NotRequired[GenerateMetrics]
    """In the last event."""


# ---- the server ----------------------------------------------------------------------------------------------


@answer
class Model(TypedDict):
    """A name that requests may give."""

    id: str
    object: Literal["model"]
    created: int
    """Seconds since 1970."""
    owned_by: str
    root: str
    """The name that answers give."""
    parent: None
    max_model_len: NotRequired[int]
    """Tokens of prompt and answer together; known once the model is loaded."""


@answer
class ModelList(TypedDict):
    """Every name that requests may give."""

    object: Literal["list"]
    data: list[Model]


@answer
class ModelState(TypedDict):
    """How one model is."""

    id: str
    state: Literal["starting", "ready", "restarting", "stopped"]


@answer
class ServerState(TypedDict):
    """How the server is."""

    status: str
    """`ok`, `ready`, or why no request would be served now."""
    models: list[ModelState]


@answer
class FrontPage(TypedDict):
    """What this is and where things are."""

    name: str
    what: str
    models: list[str]
    endpoints: dict[str, str]
    base_url: str


@answer
class ErrorDetail(TypedDict):
    """What went wrong."""

    message: str
    """Names the field, its bound and what to do."""
    type: str
    param: str | None
    """The JSON path of the field that is wrong."""
    code: str | None


@answer
class Error(TypedDict):
    """OpenAI's error body; in a stream it is the last event, without `[DONE]` after it."""

    error: ErrorDetail
