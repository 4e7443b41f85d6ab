"""All metric families of one server, in a registry of their own, and how they are written out.

Knows nothing about who counts: it is told.
"""

from collections.abc import Iterable
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from helix_gateway.telemetry.catalogue import ENGINE_METRICS, PREFIX, SERVER_METRICS, Definition
from helix_gateway.telemetry.histogram import BulkHistogram

_DEFINITIONS = (*ENGINE_METRICS, *SERVER_METRICS)
_GaugeOrCounter = TypeVar("_GaugeOrCounter", Gauge, Counter)


class Metrics:
    """The families that `catalogue.py` defines; safe to use from several threads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._gauges = {d: self._simple(Gauge, d) for d in _DEFINITIONS if d.kind == "gauge"}
        self._counters = {d: self._simple(Counter, d) for d in _DEFINITIONS if d.kind == "counter"}
        self._histograms = {d: self._histogram(d) for d in _DEFINITIONS if d.kind == "histogram"}
        ProcessCollector(registry=self._registry)

    def _simple(self, family: type[_GaugeOrCounter], definition: Definition) -> _GaugeOrCounter:
        return family(PREFIX + definition.name, definition.meaning, definition.labels, registry=self._registry)

    def _histogram(self, definition: Definition) -> BulkHistogram:
        family = BulkHistogram(definition.wire_name, definition.meaning, definition.labels, definition.buckets)
        self._registry.register(family)
        return family

    def gauge(self, definition: Definition, *labels: str) -> Gauge:
        """One series of a gauge."""
        return self._gauges[definition].labels(*labels)

    def counter(self, definition: Definition, *labels: str) -> Counter:
        """One series of a counter."""
        return self._counters[definition].labels(*labels)

    def histogram(self, definition: Definition) -> BulkHistogram:
        """A histogram."""
        return self._histograms[definition]

    def render(self, accept: str) -> tuple[bytes, str]:
        """Everything as text, in the format that the ``Accept`` header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(_WithoutCreated(self._registry)), content_type


class _WithoutCreated(Collector):
    """A registry without the series that tell when each counter began, which no dashboard asks for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
