"""What every answer says beside its text: identity, usage, and the figures for the log.

Knows nothing about chat or completions.
"""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from helix_gateway.core.event import SequenceMetrics
from helix_gateway.gateway.registry import ServedModel
from helix_gateway.gateway.schemas.answers import Usage
from helix_gateway.service.api import TextDelta


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer's identity, the same in each chunk of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self, object_name: str) -> dict[str, Any]:
        """The fields that open each body and chunk."""
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def new_reply(prefix: str, served: ServedModel) -> Reply:
    """A fresh identity; ``prefix`` is ``chatcmpl`` or ``cmpl``."""
    return Reply(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), served.name, served.fingerprint)


@dataclass(slots=True)
class Tally:
    """Counts tokens as deltas pass by."""

    prompt_tokens: list[int]
    """Of each prompt."""
    num_choices: int
    completion_tokens: int = 0
    first_token_s: float | None = None
    """The earliest of any choice, from its arrival at the engine."""
    finish_reasons: list[str] = field(default_factory=list)
    _cached: dict[int, int] = field(default_factory=dict)

    def add(self, choice: int, delta: TextDelta) -> None:
        """Take one delta."""
        self.completion_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self.finish_reasons.append(delta.finish_reason)
        if delta.metrics is not None:
            self._measure(choice // self.num_choices, delta.metrics)

    def _measure(self, prompt_index: int, metrics: SequenceMetrics) -> None:
        known = self._cached.get(prompt_index, metrics.cached_tokens)
        self._cached[prompt_index] = min(known, metrics.cached_tokens)
        times = (self.first_token_s, metrics.time_to_first_token_s)
        self.first_token_s = min((time_s for time_s in times if time_s is not None), default=None)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed: of a prompt's choices the one that found least counts."""
        return sum(self._cached.values())

    @property
    def total_tokens(self) -> int:
        """Of prompts and answers, so far."""
        return sum(self.prompt_tokens) + self.completion_tokens

    def usage(self) -> Usage:
        """OpenAI's usage object."""
        prompt_tokens = sum(self.prompt_tokens)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def for_log(self) -> dict[str, Any]:
        """The same figures as fields of the request's log line."""
        first_ms = None if self.first_token_s is None else round(self.first_token_s * 1000, 1)
        return {
            "prompt_tokens": sum(self.prompt_tokens),
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "time_to_first_token_ms": first_ms,
            "finish_reasons": self.finish_reasons,
        }
