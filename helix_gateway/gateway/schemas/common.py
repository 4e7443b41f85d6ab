"""The fields that both kinds of generation request share, with the bounds that WIRE fixes for each.

pydantic checks types strictly (no "1" for 1, no true for 1); a null is an absent field; fields that nobody
knows are kept apart, so that they can be named.  Knows nothing about tokens.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from typing_extensions import Self

from helix_gateway.service.settings import MAX_DEPTH

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_STOP_TOKENS = 1024
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
INT32_MAX = 2**31 - 1


class WireModel(BaseModel):
    """An object on the wire: strict, nulls dropped, unknown fields kept aside.

    A default that is a list or an object is made by a factory: one that stands beside its field is copied deeply for each
    request.
    """

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )

    inert_fields: ClassVar[frozenset[str]] = frozenset()
    """Known fields that change nothing here, whatever they hold."""
    own_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that hold a client's texts, or differ from request to request: nothing of a request that sends one is kept for
    others (`known_options.py`)."""
    raw_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields handed on as they lie in the body, since only the model tells how much of them is too much."""
    large_fields: ClassVar[Mapping[str, Callable[[bytes], Any]]] = {}
    """Fields that may be as large as the body, each with a reader of its outline: it fails at the first thing that
    is wrong, before megabytes of that become objects."""

    prompt_field: ClassVar[str] = ""
    """The field whose length the model's context bounds; every request has one."""
    one_prompt: ClassVar[str] = ""
    """How its value begins, as a regular expression, where it is one prompt and not several."""

    @classmethod
    def plain_prompt(cls, _raw: bytes) -> Any:
        """The prompt's field read and checked in one call, where it has the simplest form that there is; else None."""
        return None

    def without_prompt(self) -> Self:
        """The same without its prompt field: whoever asks that for it gets an AttributeError."""
        options = self.model_copy()
        del options.__dict__[self.prompt_field]
        options.model_fields_set.remove(self.prompt_field)
        return options

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict) and None in data.values():
            return {name: value for name, value in data.items() if value is not None}
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The object as clients are told of it: a field that may be absent may be null, inert fields are known."""
        told = handler(schema)
        body = handler.resolve_ref_schema(told)
        properties = body.setdefault("properties", {})
        for name, field in cls.model_fields.items():
            default = field.get_default(call_default_factory=True)
            if name in properties and isinstance(default, list | dict):
                properties[name].setdefault("default", default)
        for name in properties.keys() - set(body.get("required", ())):
            properties[name] = nullable(properties[name])
        for name in sorted(cls.inert_fields):
            properties.setdefault(name, {"description": "Accepted, and changes nothing here."})
        return told

    def unknown_below(self) -> list[str]:
        """Paths of unknown fields in this object's objects, each once, without indices: ``messages[].x``."""
        sent = self.model_fields_set
        paths: list[str] = []
        for name in _fields_of_objects(type(self)):
            if name in sent:  # what the client did not send holds nothing unknown
                paths += unknown_in(name, getattr(self, name))
        return paths

    def overruled(self) -> list[str]:
        """Known fields that had to give way to others of this request."""
        return []

    def unknown_here(self) -> list[str]:
        """Unknown fields of this object and of those in it."""
        below = self.unknown_below()
        if not self.model_extra:
            return below
        return [name for name in self.model_extra if name not in self.inert_fields] + below


def unknown_in(name: str, value: Any) -> list[str]:
    """The paths of what is unknown in a field's value, each once."""
    paths: list[str] = []
    if isinstance(value, WireModel):
        for path in value.unknown_here():
            paths.append(f"{name}.{path}")
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, WireModel):
                for path in item.unknown_here():
                    paths.append(f"{name}[].{path}")
    return list(dict.fromkeys(paths)) if paths else paths


@lru_cache
def _fields_of_objects(model: type[WireModel]) -> tuple[str, ...]:
    """The fields that may hold objects with fields of their own: of some forty, four."""
    return tuple(name for name, field in model.model_fields.items() if _holds_objects(field.annotation))


def _holds_objects(annotation: Any) -> bool:
    if parts := get_args(annotation):
        return any(map(_holds_objects, parts))
    return isinstance(annotation, type) and issubclass(annotation, WireModel)


def nullable(field: JsonSchemaValue) -> JsonSchemaValue:
    """A JSON schema that takes null besides, in the shortest form there is."""
    kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    rest = {name: value for name, value in field.items() if name != "anyOf" and (name, value) != ("default", None)}
    if field.get("type") == "null":
        return rest
    if len(kinds) == 1:
        rest, kinds = {**rest, **kinds[0]}, []
    if not kinds and isinstance(rest.get("type"), str) and not rest.keys() & {"enum", "const"}:
        return {**rest, "type": [rest["type"], "null"]}
    about: JsonSchemaValue = {name: rest.pop(name) for name in ("description", "default") if name in rest}
    return {**about, "anyOf": [*(kinds or [rest]), {"type": "null"}]}


def field_problem(field: str, problem: str) -> PydanticCustomError:
    """What a check over several fields raises: ``field`` is the one to name."""
    return PydanticCustomError("fields", "{problem}", {"field": field, "problem": problem})


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("string_or_list", "must be a string or an array of strings")
    return value


def _string_or_list(most: int) -> WithJsonSchema:
    string = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
    return WithJsonSchema({"anyOf": [string, {"type": "array", "items": string, "maxItems": most}]})


StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopStringList = Annotated[
    list[StopString],
    Field(fail_fast=True, max_length=MAX_STOP_STRINGS),
    BeforeValidator(_listed),
    _string_or_list(MAX_STOP_STRINGS),
]
BadWordList = Annotated[
    list[StopString],
    Field(fail_fast=True, max_length=MAX_BAD_WORDS),
    BeforeValidator(_listed),
    _string_or_list(MAX_BAD_WORDS),
]
TokenIdList = Annotated[
    list[Annotated[int, Field(ge=0, le=INT32_MAX)]], Field(fail_fast=True, max_length=MAX_STOP_TOKENS)
]
ONE_PROMPT: tuple[JsonDict, JsonDict] = (
    {"type": "string"},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX}, "minItems": 1},
)
"""A text, or its token ids, as JSON schemas."""
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
Biases = Annotated[
    dict[str, Bias],
    Field(json_schema_extra={"maxProperties": MAX_LOGIT_BIAS, "propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
]
_AS_IF_LEFT_OUT = ("on", "auto")
"""Words of servers' flags, accepted as a request's `speculation`: what they leave open, this server decides by itself."""
Speculation = Annotated[
    Literal["off"] | int | None,
    WithJsonSchema(
        {"anyOf": [{"enum": ["off", *_AS_IF_LEFT_OUT]}, {"type": "integer", "minimum": 0, "maximum": MAX_DEPTH}]}
    ),
]


class StreamOptions(WireModel):
    """What a stream tells besides text."""

    inert_fields = frozenset({"include_obfuscation"})

    include_usage: bool = False
    """Whether a last chunk tells the usage."""


_NO_OPTIONS = StreamOptions()


class ResponseFormat(WireModel):
    """Only text yet."""

    inert_fields = frozenset()

    type: str = Field(json_schema_extra={"enum": ["text"]})

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

    own_fields = frozenset({"bad_words", "cache_salt", "prediction", "seed", "stop"})
    """The `prediction` is declared by each route."""

    model: str = ""
    """A served model's name. May be left out where one model is served."""
    stream: bool = False
    """Whether the answer comes as server-sent events."""
    stream_options: StreamOptions = Field(default_factory=lambda: _NO_OPTIONS)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    """Answers for each prompt; they share the prompt's keys and values."""
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """Answers generated for each prompt, of which the `n` likeliest are told. Not with `stream`."""
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Only the likeliest tokens that together have this probability."""
    top_k: int = Field(-1, ge=-1, le=INT32_MAX)
    """Only this many of the likeliest tokens; -1 and 0: all."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Only tokens that have at least this share of the likeliest one's probability."""
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Taken once from the logit of each token that the answer holds."""
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Taken from a token's logit for each time that the answer holds it."""
    repetition_penalty: float = Field(1.0, gt=0.0, le=10.0)
    """Divides positive and multiplies negative logits of tokens in prompt or answer."""
    logit_bias: Biases = Field(default_factory=dict)
    """Added to logits, by token id."""
    bad_words: BadWordList = Field(default_factory=list)
    """What the answer must not hold."""
    min_tokens: int = Field(0, ge=0, le=INT32_MAX)
    """Tokens before which no stop counts."""
    stop: StopStringList = Field(default_factory=list)
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: TokenIdList = Field(default_factory=list)
    """Tokens that end the answer."""
    ignore_eos: bool = False
    """Whether to go on past the end that the model makes."""
    skip_special_tokens: bool = True
    """Whether the text leaves out tokens like the end mark."""
    include_stop_str_in_output: bool = False
    """Whether the text keeps the stop string that ended it."""
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    """The same seed gives the same text, whatever the load. Left out, one is drawn and told in the header `x-helix-seed`."""
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Tells each prompt token's log-probability and this many of the likeliest in its place."""
    return_token_ids: bool = False
    """Whether token ids stand beside the text."""
    priority: int = Field(0, ge=-(2**31), le=INT32_MAX)
    """Lower is served first."""
    cache_salt: str = Field("", max_length=1024)
    """Prompts are found in the cache only by requests of equal salt."""
    speculation: Speculation = None
    """`off`, or the most tokens to draft a step; `on` and `auto` are as if it were left out. On a CPU it never changes the
    text, only when it comes."""
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
        if value in _AS_IF_LEFT_OUT:
            return None
        if value != "off" and (type(value) is not int or not 0 <= value <= MAX_DEPTH):
            raise PydanticCustomError(
                "speculation",
                'must be "off", "on", "auto" or the most tokens to draft a step, 0 to {most}',
                {"most": MAX_DEPTH},
            )
        return value

    @model_validator(mode="after")
    def _best_of_enough(self) -> "GenerationRequest":
        if self.best_of is not None and self.best_of < self.n:
            raise field_problem("best_of", "must be at least `n`")
        if self.stream and self.best_of is not None and self.best_of > self.n:
            raise field_problem("best_of", "greater than `n` cannot be streamed: the best are known only at the end")
        return self
