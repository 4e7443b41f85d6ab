"""Figures of one level of load.  Knows nothing about how requests were sent, nor about how figures are shown.

Throughput is what all finished and unfinished answers brought, over the time from the first request's sending to the
last one's end, so a closed loop's last few seconds, in which fewer streams run, count too.  Latencies are those of
answers that came to their end.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from helix_gateway.cli.load.level import Level, RequestRecord

_ERROR_WIDTH = 160
_ID = re.compile(r"\b(?:req|chatcmpl|cmpl)[-_]\w+")


@dataclass(frozen=True, slots=True)
class Spread:
    """How a latency is distributed, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """None where there is nothing to tell of."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which this share of the sorted values lies, between neighbours linearly."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class LevelSummary:
    """One level's figures; times in seconds, None where no answer had one."""

    load: str
    finished: int
    failed: int
    cancelled: int
    elapsed_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    ttft_s: Spread | None
    """From the moment at which a request was due to its first piece of text."""
    gap_s: Spread | None
    """Between one piece of text and the next: inter-token latency where a server sends a token a piece."""
    time_per_output_token_s: Spread | None
    """Of each answer: from its first piece to its last, over its tokens but the first."""
    e2e_s: Spread | None
    lag_s: Spread | None
    """How late this machine sent its requests: where it is not small against the rest, the figures are the client's."""
    tokens_counted_by_server: bool
    errors: dict[str, int]
    """How often each was told, ids of requests left out."""


def summarise(level: Level) -> LevelSummary:
    """The figures of a level that has ended."""
    records, elapsed_s = level.records, level.elapsed_s
    done = [record for record in records if record.done]
    failed = [record for record in records if record.error is not None]
    tokens = sum(record.output_tokens for record in records)
    return LevelSummary(
        load=str(level.load),
        finished=len(done),
        failed=len(failed),
        cancelled=len(records) - len(done) - len(failed),
        elapsed_s=elapsed_s,
        prompt_tokens=sum(record.prompt_tokens for record in done),
        cached_tokens=sum(record.cached_tokens for record in done),
        output_tokens=tokens,
        output_tokens_per_s=tokens / elapsed_s if elapsed_s else 0.0,
        requests_per_s=len(done) / elapsed_s if elapsed_s else 0.0,
        ttft_s=Spread.of(record.ttft_s for record in done if record.ttft_s is not None),
        gap_s=Spread.of(gap_s for record in done for gap_s in record.gaps_s),
        time_per_output_token_s=Spread.of(_time_per_output_token_s(record) for record in done if record.gaps_s),
        e2e_s=Spread.of(record.e2e_s for record in done if record.e2e_s is not None),
        lag_s=Spread.of(record.lag_s for record in records),
        tokens_counted_by_server=all(record.counted_by_server for record in done),
        errors=dict(Counter(_ID.sub("…", record.error or "")[:_ERROR_WIDTH] for record in failed)),
    )


def _time_per_output_token_s(record: RequestRecord) -> float:
    return sum(record.gaps_s) / max(1, record.output_tokens - 1)
