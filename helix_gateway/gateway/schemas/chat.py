"""What `/v1/chat/completions` takes.

Tools, structured output and audio are known by name and refused by name.  Knows nothing about templates.
"""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, WithJsonSchema, field_validator, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from helix_gateway.gateway.schemas.common import MAX_TOP_LOGPROBS, GenerationRequest, WireModel, field_problem
from helix_gateway.gateway.schemas.content import Content, Prediction, text_pieces

MAX_MESSAGES = 16_384
NO_TOOLS: JsonDict = {"enum": ["none", "auto"]}


Role = Annotated[
    Literal["system", "developer", "user", "assistant", "tool", "function"],
    WithJsonSchema({"enum": ["system", "developer", "user", "assistant"]}),
]


class ChatMessage(WireModel):
    """One message; a missing content is empty."""

    inert_fields = frozenset({"refusal", "annotations"})

    role: Role
    """`developer` is `system`."""
    content: Content = ""
    """A text, or parts that are joined."""
    name: str | None = None
    """Who speaks, for templates that tell several users apart."""
    tool_calls: list[Any] = Field(default_factory=list, json_schema_extra={"maxItems": 0})
    """Not supported yet."""
    function_call: dict[str, Any] | None = Field(None, json_schema_extra={"maxProperties": 0})
    """Not supported yet."""
    tool_call_id: str | None = None
    """Not supported yet."""

    @model_validator(mode="after")
    def _no_tools(self) -> "ChatMessage":
        if self.role in ("tool", "function"):
            raise PydanticCustomError(
                "tools", "has the role `{role}`: tools are not supported yet", {"role": self.role}
            )
        if self.tool_calls or self.function_call:
            raise PydanticCustomError("tools", "calls tools, which are not supported yet")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as `text/` takes it: parts are text parts, and it joins them."""
        named = {} if self.name is None else {"name": self.name}
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content, **named}
        parts = [{"type": "text", "text": text} for text in self.texts]
        return {"role": self.role, "content": parts, **named}

    @property
    def texts(self) -> list[str]:
        """The content's pieces."""
        return text_pieces(self.content)


class TextMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message of a role and a text alone, as most are: the same as the `ChatMessage` of it, read in one call."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    def for_template(self) -> dict[str, Any]:
        """See `ChatMessage`."""
        return {"role": self.role, "content": self.content}

    @property
    def texts(self) -> list[str]:
        """See `ChatMessage`."""
        return [self.content]


_read_text_messages = msgspec.json.Decoder(
    Annotated[list[TextMessage], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
).decode


class _MessageOutline(msgspec.Struct):
    role: str


class ChatRequest(GenerationRequest):
    """A conversation to answer."""

    inert_fields = frozenset({"user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier"})
    prompt_field, one_prompt = "messages", r"\[\s*\{"
    large_fields = {"messages": msgspec.json.Decoder(list[_MessageOutline]).decode}

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    """The conversation so far, oldest first."""
    max_tokens: int | None = Field(None, ge=1)
    """The most tokens of an answer. Left out, it goes on to a stop or the end of the context. What the context has no
    room for is cut off it, and the header `x-helix-clamped` says so."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The same by its newer name, which counts where both are given."""
    logprobs: bool = False
    """Whether to tell each token's log-probability."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """How many of the likeliest tokens to tell in each place; needs `logprobs`."""
    prediction: Prediction | None = None
    """A draft of the answer. `usage` tells how many of its tokens were right."""
    tools: list[Any] = Field(default_factory=list, json_schema_extra={"maxItems": 0})
    """Not supported yet."""
    tool_choice: Any = Field("none", json_schema_extra=NO_TOOLS)
    """Not supported yet."""
    functions: list[Any] = Field(default_factory=list, json_schema_extra={"maxItems": 0})
    """Not supported yet."""
    function_call: Any = Field("none", json_schema_extra=NO_TOOLS)
    """Not supported yet."""
    modalities: list[str] = Field(default_factory=lambda: ["text"], json_schema_extra={"const": ["text"]})
    """Answers are text."""
    audio: Any = Field(None, json_schema_extra={"type": "null"})
    """Not supported."""

    @field_validator("tools", "functions")
    @classmethod
    def _no_tools(cls, value: list[Any]) -> list[Any]:
        if value:
            raise PydanticCustomError("tools", "names tools, which are not supported yet; send none")
        return value

    @field_validator("tool_choice", "function_call")
    @classmethod
    def _no_choice(cls, value: Any) -> Any:
        if value not in ("none", "auto"):
            raise PydanticCustomError(
                "tools", "asks for a tool, which are not supported yet; `none` and `auto` are fine"
            )
        return value

    @field_validator("modalities")
    @classmethod
    def _only_text(cls, value: list[str]) -> list[str]:
        if value != ["text"]:
            raise PydanticCustomError("modalities", 'must be ["text"]: this model answers in text only')
        return value

    @field_validator("audio")
    @classmethod
    def _no_audio(cls, value: Any) -> Any:
        raise PydanticCustomError("audio", "asks for audio, which is not supported: answers are text")

    @model_validator(mode="after")
    def _logprobs_asked(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise field_problem("top_logprobs", "needs `logprobs` to be true")
        return self

    @classmethod
    def plain_prompt(cls, raw: bytes) -> list[TextMessage] | None:
        """See `WireModel`."""
        try:
            messages: list[TextMessage] = _read_text_messages(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        return messages

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, which took the place of `max_tokens`, or else that."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def overruled(self) -> list[str]:
        """See `WireModel`."""
        return ["max_tokens"] if self.max_tokens not in (None, self.token_limit) else []
