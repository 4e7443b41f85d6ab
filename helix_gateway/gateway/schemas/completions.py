"""What `/v1/completions` takes.

Knows nothing about tokens: the prompt is handed on as it lies in the body (`prompts.py` reads it).
"""

from typing import Any

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from helix_gateway.gateway.schemas.common import MAX_TOP_LOGPROBS, GenerationRequest, field_problem

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationRequest):
    """The whole request."""

    inert_fields = frozenset({"user", "store", "metadata", "service_tier"})
    raw_fields = frozenset({"prompt"})

    prompt: Any
    """msgspec.Raw: a string, an array of strings, token ids, or arrays of token ids."""
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True
    suffix: str = ""

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
