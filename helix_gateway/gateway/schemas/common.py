"""The fields that both kinds of generation request share, with the bounds that WIRE fixes for each.

pydantic checks types strictly (no "1" for 1, no true for 1); a null is an absent field; fields that nobody
knows are kept apart, so that they can be named.  Knows nothing about tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_STOP_TOKENS = 1024
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
INT32_MAX = 2**31 - 1


class WireModel(BaseModel):
    """An object on the wire: strict, nulls dropped, unknown fields kept aside."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    inert_fields: ClassVar[frozenset[str]] = frozenset()
    """Known fields that change nothing here, whatever they hold."""
    raw_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields handed on as they lie in the body, since only the model tells how much of them is too much."""
    large_fields: ClassVar[Mapping[str, Callable[[bytes], Any]]] = {}
    """Fields that may be as large as the body, each with a reader of its outline: it fails at the first thing that
    is wrong, before megabytes of that become objects."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict) and None in data.values():
            return {name: value for name, value in data.items() if value is not None}
        return data

    def unknown_below(self) -> list[str]:
        """Paths of unknown fields in this object's objects, each once, without indices: ``messages[].x``."""
        return list(dict.fromkeys(path for name in type(self).model_fields for path in self._unknown_in(name)))

    def _unknown_in(self, name: str) -> Iterator[str]:
        value = getattr(self, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, WireModel):
                prefix = f"{name}[]" if isinstance(value, list) else name
                yield from (f"{prefix}.{path}" for path in item.unknown_here())

    def unknown_here(self) -> list[str]:
        """Unknown fields of this object and of those in it."""
        own = [name for name in self.model_extra or () if name not in self.inert_fields]
        return own + self.unknown_below()


def field_problem(field: str, problem: str) -> PydanticCustomError:
    """What a check over several fields raises: ``field`` is the one to name."""
    return PydanticCustomError("fields", "{problem}", {"field": field, "problem": problem})


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("string_or_list", "must be a string or an array of strings")
    return value


StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopStringList = Annotated[
    list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS), BeforeValidator(_listed)
]
BadWordList = Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_BAD_WORDS), BeforeValidator(_listed)]
TokenIdList = Annotated[
    list[Annotated[int, Field(ge=0, le=INT32_MAX)]], Field(fail_fast=True, max_length=MAX_STOP_TOKENS)
]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]


class StreamOptions(WireModel):
    """What a stream tells besides text."""

    inert_fields = frozenset({"include_obfuscation"})

    include_usage: bool = False


class ResponseFormat(WireModel):
    """Only text yet."""

    inert_fields = frozenset()

    type: str

    @field_validator("type")
    @classmethod
    def _only_text(cls, value: str) -> str:
        if value not in ("text", "json_object", "json_schema"):
            raise PydanticCustomError("format", "must be `text`")
        if value != "text":
            raise PydanticCustomError(
                "format", "asks for structured output, which is not supported yet; only `text` is"
            )
        return value


class GenerationRequest(WireModel):
    """What chat and plain completions have in common."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(-1, ge=-1, le=INT32_MAX)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(1.0, gt=0.0, le=10.0)
    logit_bias: dict[str, Bias] = {}
    bad_words: BadWordList = []
    min_tokens: int = Field(0, ge=0, le=INT32_MAX)
    stop: StopStringList = []
    stop_token_ids: TokenIdList = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    return_token_ids: bool = False
    priority: int = Field(0, ge=-(2**31), le=INT32_MAX)
    cache_salt: str = Field("", max_length=1024)
    speculation: Literal["off"] | int | None = None
    response_format: ResponseFormat | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
            raise PydanticCustomError(
                "too_many",
                "must have at most {most} entries; it has {found}",
                {"most": MAX_LOGIT_BIAS, "found": len(value)},
            )
        return value

    @field_validator("speculation", mode="before")
    @classmethod
    def _depth_or_off(cls, value: Any) -> Any:
        if value != "off" and (type(value) is not int or not 0 <= value <= 64):
            raise PydanticCustomError("speculation", 'must be "off" or the most tokens to draft a step, 0 to 64')
        return value

    @model_validator(mode="after")
    def _best_of_enough(self) -> "GenerationRequest":
        if self.best_of is not None and self.best_of < self.n:
            raise field_problem("best_of", "must be at least `n`")
        if self.stream and self.best_of is not None and self.best_of > self.n:
            raise field_problem("best_of", "greater than `n` cannot be streamed: the best are known only at the end")
        return self
