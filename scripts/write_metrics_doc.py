"""Write `docs/metrics.md` from the definitions of the metrics: ``python scripts/write_metrics_doc.py``.

A test fails where the page says something else than the code.
"""

from collections.abc import Sequence
from pathlib import Path

from helix_gateway.telemetry.catalogue import ENGINE_METRICS, SERVER_METRICS, Definition

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

_INTRODUCTION = """\
# Metrics

<!-- Written by scripts/write_metrics_doc.py from helix_gateway/telemetry/catalogue.py: change those. -->

`GET /metrics` answers in Prometheus' text format, or as OpenMetrics where the scraper asks for it. It needs no API key,
even where one is set, as other servers of this field have it: nothing of what anybody wrote is in it. Where even the
load is nobody's business, let the proxy in front refuse the route. A scraper that calls the server by a name needs
that name in `--allowed-hosts` while the server listens on loopback.

```yaml
scrape_configs:
  - job_name: helix
    static_configs:
      - targets: ["127.0.0.1:8000"]
```

Names are those that dashboards for language-model servers know, with the prefix `helix:`; `model_name` is the name that
answers carry. Gauges come from the engine's process at most half a second late, and at once when it falls idle;
token counters are exact at every scrape. When an engine dies its gauges go to zero, its sequences end as `error`, and
the counters go on from where they were: they never go down while the server lives.

A sequence is one answer being generated: a request with `n = 3` has three.
"""
_MORE = """\
## Of the gateway's process

`process_cpu_seconds_total`, `process_resident_memory_bytes`, `process_open_fds`, `process_start_time_seconds` and their
like are there on Linux as from any Python program. They speak of the gateway's process, not of the engine's.
"""


def page() -> str:
    """The whole page."""
    queries = [definition for definition in (*ENGINE_METRICS, *SERVER_METRICS) if definition.query]
    return "\n".join(
        (
            _INTRODUCTION,
            "## The engine\n",
            *_table(ENGINE_METRICS),
            "\n## The server\n",
            *_table(SERVER_METRICS),
            "\n" + _MORE,
            "## Buckets\n",
            *(f"- `{d.wire_name}`: {', '.join(f'{b:g}' for b in d.buckets)}" for d in _histograms()),
            "\n## Worth asking\n",
            *(f"`{definition.wire_name}`\n\n```promql\n{definition.query}\n```\n" for definition in queries),
        )
    )


def _histograms() -> list[Definition]:
    return [definition for definition in (*ENGINE_METRICS, *SERVER_METRICS) if definition.buckets]


def _table(definitions: Sequence[Definition]) -> list[str]:
    rows = ["| metric | type | labels | unit | meaning |", "|---|---|---|---|---|"]
    for definition in definitions:
        labels = ", ".join(f"`{label}`" for label in definition.labels) or "none"
        rows.append(
            f"| `{definition.wire_name}` | {definition.kind} | {labels} | {definition.unit} | {definition.meaning} |"
        )
    return rows


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE} is written")
