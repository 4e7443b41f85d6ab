"""What every answer says beside its text: identity, usage, and the figures for the log.

Knows nothing about chat or completions.
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
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
    return Reply(f"{prefix}-{os.urandom(16).hex()}", int(time.time()), served.name, served.fingerprint)


@dataclass(slots=True)
class Tally:
    """Counts tokens as deltas pass by."""

    prompt_tokens: list[int]
    """Of each prompt."""
    num_choices: int
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    measured: dict[int, SequenceMetrics] = field(default_factory=dict)
    """Of each choice that has come to its end."""
    _cached: dict[int, int] = field(default_factory=dict)

    def add(self, choice: int, delta: TextDelta) -> None:
        """Take one delta."""
        self.completion_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self.finish_reasons.append(delta.finish_reason)
        if delta.metrics is not None:
            self.measured[choice] = delta.metrics
            self._count_cached(choice // self.num_choices, delta.metrics)

    def _count_cached(self, prompt_index: int, metrics: SequenceMetrics) -> None:
        known = self._cached.get(prompt_index, metrics.cached_tokens)
        self._cached[prompt_index] = min(known, metrics.cached_tokens)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed: of a prompt's choices the one that found least counts."""
        return sum(self._cached.values())

    @property
    def complete(self) -> bool:
        """Whether every choice has come to its end."""
        return len(self.finish_reasons) == len(self.prompt_tokens) * self.num_choices

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
                "accepted_prediction_tokens": self._sum_of("accepted_prediction_tokens"),
                "rejected_prediction_tokens": self._sum_of("rejected_prediction_tokens"),
            },
        }

    def _sum_of(self, figure: str) -> int:
        return sum(getattr(metrics, figure) for metrics in self.measured.values())

    def for_log(self) -> dict[str, Any]:
        """The same figures as fields of the request's log line."""
        measured = self.measured.values()
        times_s = [time_s for metrics in measured for time_s in metrics.token_times_s]
        rate = tokens_per_second(times_s)
        figures = {
            "prompt_tokens": sum(self.prompt_tokens),
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens if measured else None,
            "queue_ms": _least_ms(metrics.queue_time_s for metrics in measured),
            "time_to_first_token_ms": _least_ms(times_s),
            "tokens_per_s": None if rate is None else round(rate, 1),
            "draft_tokens": self._sum_of("draft_tokens") if measured else None,
            "accepted_tokens": self._sum_of("accepted_tokens") if measured else None,
            "drafters": self._drafters() or None,
            "depths": self._depths() if self._sum_of("draft_tokens") else None,
            **self._step_ms(),
            "finish_reasons": self.finish_reasons,
        }
        # What an answer that was cut off has not come to is left out, rather than said to be nothing.
        return {name: figure for name, figure in figures.items() if figure is not None}

    def _drafters(self) -> dict[str, dict[str, Any]]:
        """What came of drafts by drafter, over all choices."""
        drafts = [counts for metrics in self.measured.values() for counts in metrics.drafts.items()]
        return {
            name: {
                "drafted": sum(counts.num_draft_tokens for drafter, counts in drafts if drafter == name),
                "accepted": sum(counts.num_accepted_tokens for drafter, counts in drafts if drafter == name),
                "accepted_per_position": _added(
                    counts.accepted_per_position for drafter, counts in drafts if drafter == name
                ),
            }
            for name in sorted({drafter for drafter, _ in drafts})
        }

    def _depths(self) -> list[int]:
        """How many steps of its choices verified so many draft tokens, from 0 on."""
        return _added(metrics.depths for metrics in self.measured.values())

    def _step_ms(self) -> dict[str, float]:
        """What steps took, by part: of the choice that it is most for, since choices share steps."""
        if not self.measured:
            return {}
        times = [metrics.step_time for metrics in self.measured.values()]
        return {
            "draft_ms": round(max(time.draft_s for time in times) * 1000, 1),
            "verify_ms": round(max(time.verify_s for time in times) * 1000, 1),
            "sample_ms": round(max(time.sample_s for time in times) * 1000, 1),
        }


def _added(columns: Iterable[Sequence[int]]) -> list[int]:
    """Counts added place by place, as far as the longest goes."""
    return [sum(places) for places in zip_longest(*columns, fillvalue=0)]


def _least_ms(seconds: Iterable[float]) -> float | None:
    least = min(seconds, default=None)
    return None if least is None else round(least * 1000, 1)


def tokens_per_second(times_s: Sequence[float]) -> float | None:
    """The rate after the first step, which also computed the prompt; None where one step made all."""
    first, last = min(times_s, default=0.0), max(times_s, default=0.0)
    if last <= first:
        return None
    return sum(time_s > first for time_s in times_s) / (last - first)
