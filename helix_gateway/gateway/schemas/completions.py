"""What `/v1/completions` takes.

Knows nothing about tokens: the prompt is handed on as it lies in the body (`prompts.py` reads it).
"""

from typing import Any

from pydantic import Field, field_validator, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from helix_gateway.gateway.schemas.common import MAX_TOP_LOGPROBS, ONE_PROMPT, GenerationRequest, field_problem
from helix_gateway.gateway.schemas.content import Prediction

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 1024
"""Prompts of one request."""


def _many(*prompts: JsonDict) -> list[JsonDict]:
    return [{"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": prompt} for prompt in prompts]


class CompletionRequest(GenerationRequest):
    """Prompts to go on from."""

    inert_fields = frozenset({"user", "store", "metadata", "service_tier"})
    raw_fields = frozenset({"prompt"})
    prompt_field, one_prompt = "prompt", r'"|\[\s*[-\d]'

    # bytes as they lie in the body
    prompt: Any = Field(json_schema_extra={"anyOf": [*ONE_PROMPT, *_many(*ONE_PROMPT)]})
    """A string, an array of strings, token ids, or arrays of token ids."""
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=0)
    """The most tokens of an answer; 0 only with `echo`. What the context has no room for is cut off it, and the header
    `x-helix-clamped` says so."""
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Tells each token's log-probability and this many of the likeliest in its place."""
    echo: bool = False
    """Whether the prompt stands before the answer."""
    add_special_tokens: bool = True
    """Whether the prompt gets the model's mark for a beginning."""
    prediction: Prediction | None = None
    """A draft of the answer, of every one where there are several. `usage` tells how many of its tokens were right."""
    suffix: str = Field("", json_schema_extra={"maxLength": 0})
    """Not supported: this model has no fill-in-the-middle format."""

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str) -> str:
        if value:
            raise PydanticCustomError("suffix", "cannot be honoured: this model has no fill-in-the-middle format")
        return value

    @model_validator(mode="after")
    def _nothing_only_with_echo(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise field_problem("max_tokens", "must be at least 1 (0 is for `echo`)")
        return self
