"""What `/generate` and `/generate/stream` take: one prompt, one answer, with the sampling options of all routes.

Knows nothing about tokens: the prompt is handed on as it lies in the body (`prompts.py` reads it).
"""

from typing import Any, Literal

from pydantic import Field

from helix_gateway.gateway.schemas.common import MAX_TOP_LOGPROBS, ONE_PROMPT, GenerationRequest
from helix_gateway.gateway.schemas.content import Prediction


class GenerateRequest(GenerationRequest):
    """One prompt to go on from."""

    inert_fields = frozenset({"user", "store", "metadata", "service_tier"})
    raw_fields = frozenset({"prompt"})
    prompt_field, one_prompt = "prompt", ""

    # bytes as they lie in the body
    prompt: Any = Field(json_schema_extra={"anyOf": [*ONE_PROMPT]})
    """A string or token ids."""
    max_tokens: int | None = Field(None, ge=1)
    """The most tokens of the answer. Left out, it goes on to a stop or the end of the context. What the context has no
    room for is cut off it, and the header `x-helix-clamped` says so."""
    n: int = Field(1, ge=1, le=1)
    """One prompt has one answer here; `/v1/completions` gives several."""
    best_of: int | None = Field(None, ge=1, le=1)
    """As `n`."""
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Tells each token's log-probability and this many of the likeliest in its place."""
    prediction: Prediction | None = None
    """A draft of the answer. `metrics` tells how many drafts were right."""
    add_special_tokens: bool = True
    """Whether the prompt gets the model's mark for a beginning."""


class GenerateStreamRequest(GenerateRequest):
    """One prompt to go on from, as a stream."""

    stream: Literal[True] = True
    """The route itself says that the answer is a stream."""
