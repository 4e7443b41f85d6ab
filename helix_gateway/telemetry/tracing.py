"""Spans of requests, handed to OpenTelemetry when a request is over: one, with its phases as children.

Nothing is measured for it: the times are those that the log and the metrics have already, so a server without an
endpoint pays nothing and does not import the library (an extra: ``helix-gateway[otel]``).  A ``traceparent`` that the
client sent makes the span a child of the client's.  Names follow the W3C's Trace Context.  Knows nothing about HTTP.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

TRACES_PATH = "/v1/traces"
_STANDARD_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_FLUSH_S = 2.0


class TracingUnavailableError(Exception):
    """The library is not installed; the message is one clear line."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of a request's life, in nanoseconds since 1970."""

    name: str
    start_ns: int
    end_ns: int
    attributes: "Mapping[str, AttributeValue]" = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRequest:
    """A request that is over."""

    whole: Phase
    phases: Sequence[Phase]
    headers: Mapping[str, str]
    """What the client sent, in lower case: ``traceparent``, ``tracestate``, ``baggage``."""
    error: str | None = None
    """What kind of failure it was, where the server failed."""


class Tracer:
    """Hands requests to a provider of OpenTelemetry's SDK.

    Raises:
        ImportError: it is not installed.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import propagate, trace

        self._provider = provider
        self._tracer = provider.get_tracer("helix_gateway")
        self._extract = propagate.extract
        self._trace = trace

    def record(self, request: TracedRequest) -> str:
        """Make the request's spans; the trace's id, for the log."""
        trace, whole = self._trace, request.whole
        span = self._tracer.start_span(
            whole.name,
            context=self._extract(request.headers),
            kind=trace.SpanKind.SERVER,
            attributes=whole.attributes,
            start_time=whole.start_ns,
        )
        within = trace.set_span_in_context(span)
        for phase in request.phases:
            child = self._tracer.start_span(
                phase.name, context=within, attributes=phase.attributes, start_time=phase.start_ns
            )
            child.end(phase.end_ns)
        if request.error is not None:
            span.set_status(trace.StatusCode.ERROR, request.error)
        span.end(whole.end_ns)
        return f"{span.get_span_context().trace_id:032x}"

    def close(self) -> None:
        """Send what has not been sent, for two seconds at most: a collector that is away must not keep the server."""
        thread = Thread(target=self._provider.shutdown, name="traces-end", daemon=True)
        thread.start()
        thread.join(_FLUSH_S)


def open_tracer(endpoint: str | None) -> Tracer | None:
    """A tracer that sends to an OTLP collector over HTTP; None where no endpoint is set.

    Args:
        endpoint: the collector's address, with or without the path of traces; None: what OpenTelemetry's own
            variables say.

    Raises:
        TracingUnavailableError: an endpoint is set and the library is not there.
    """
    if endpoint is None and not any(os.environ.get(name) for name in _STANDARD_VARIABLES):
        return None
    try:
        return Tracer(_provider(endpoint))
    except ImportError as error:
        raise TracingUnavailableError(
            f"Traces need OpenTelemetry ({error.name} is not there): pip install 'helix-gateway[otel]'."
        ) from error


def _provider(endpoint: str | None) -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # Where none is given the exporter reads the variables itself, headers and timeouts among them.
    exporter = OTLPSpanExporter() if endpoint is None else OTLPSpanExporter(traces_url(endpoint))
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def traces_url(endpoint: str) -> str:
    """Where a collector takes traces: its own address with the path that OTLP gives them."""
    return endpoint if endpoint.rstrip("/").endswith(TRACES_PATH) else endpoint.rstrip("/") + TRACES_PATH


def _resource() -> "Resource":
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource

    found = Resource.create()
    named = not str(found.attributes[SERVICE_NAME]).startswith("unknown_service")
    return found if named else found.merge(Resource({SERVICE_NAME: "helix"}))
