"""Log lines for people: the time of day, what happened, and the figures that matter, in few words.

    14:03:07 [info] POST /v1/chat/completions 200 took=1.53s model=smollm2 in=31 out=64 ttft=35ms rate=42/s end=stop …

Knows the fields of the gateway's request line, and changes no other line but for leaving out what is None.
"""

from collections.abc import Callable, Mapping
from typing import Any

import structlog

_Show = Callable[[Any], object]


def _duration(value_ms: float) -> str:
    return f"{value_ms / 1000:.2f}s" if value_ms >= 1000 else f"{value_ms:.0f}ms"


def _as_it_is(value: Any) -> object:
    return value


def _joined(reasons: list[str]) -> str:
    return ",".join(sorted(set(reasons)))


def _drafters_shown(drafters: Mapping[str, Mapping[str, int]]) -> str:
    """Accepted of drafted tokens, drafter by drafter."""
    return ",".join(f"{name}:{counts['accepted']}/{counts['drafted']}" for name, counts in drafters.items())


_FIELDS: Mapping[str, tuple[str, _Show]] = {
    "duration_ms": ("took", _duration),
    "model": ("model", _as_it_is),
    "choices": ("choices", _as_it_is),
    "prompt_tokens": ("in", _as_it_is),
    "cached_tokens": ("cached", _as_it_is),
    "completion_tokens": ("out", _as_it_is),
    "queue_ms": ("queue", _duration),
    "time_to_first_token_ms": ("ttft", _duration),
    "tokens_per_s": ("rate", lambda rate: f"{rate:.0f}/s"),
    "draft_tokens": ("drafted", _as_it_is),
    "accepted_tokens": ("accepted", _as_it_is),
    "drafters": ("by", _drafters_shown),
    "finish_reasons": ("end", _joined),
}
_NOT_WORTH_A_WORD: Mapping[str, object] = {
    "stream": False, "choices": 1, "cached_tokens": 0, "draft_tokens": 0, "accepted_tokens": 0, "finish_reasons": [],
}  # fmt: skip
_FOR_MACHINES = frozenset({"depths", "draft_ms", "verify_ms", "sample_ms"})
"""Left to JSON lines."""
_SHORTEST_QUEUE_MS = 1.0


def at_a_glance(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Shorten the line of a request (a structlog processor)."""
    if line.get("event") != "request":
        return line
    head = {key: line.pop(key) for key in ("timestamp", "level") if key in line}
    event = f"{line.pop('method')} {line.pop('path')} {line.pop('status')}"
    del line["event"]
    request_id = line.pop("request_id", None)
    line = {key: value for key, value in line.items() if _worth_a_word(key, value)}
    known = {name: show(line.pop(key)) for key, (name, show) in _FIELDS.items() if key in line}
    return {**head, "event": event, **known, **line, "id": request_id}


def _worth_a_word(key: str, value: Any) -> bool:
    if key in _FOR_MACHINES:
        return False
    if key == "queue_ms":
        return value is not None and value >= _SHORTEST_QUEUE_MS
    return value is not None and not (key in _NOT_WORTH_A_WORD and value == _NOT_WORTH_A_WORD[key])
