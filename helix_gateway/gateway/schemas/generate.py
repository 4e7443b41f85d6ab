"""What `/generate` and `/generate/stream` take: one prompt, one answer, with the sampling options of all routes.

Knows nothing about tokens: the prompt is handed on as it lies in the body (`prompts.py` reads it).
"""

from typing import Any, Literal

from pydantic import Field

from helix_gateway.gateway.schemas.common import MAX_TOP_LOGPROBS, GenerationRequest


class GenerateRequest(GenerationRequest):
    """One prompt to go on from."""

    inert_fields = frozenset({"user", "store", "metadata", "service_tier"})
    raw_fields = frozenset({"prompt"})

    prompt: Any
    """msgspec.Raw: a string or token ids."""
    max_tokens: int | None = Field(None, ge=1)
    n: Literal[1] = 1
    best_of: Literal[1] | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    add_special_tokens: bool = True


class GenerateStreamRequest(GenerateRequest):
    """The same where the route itself says that the answer is a stream."""

    stream: Literal[True] = True
