"""A finished request as spans: queue, prefill and decode of each choice, under the request's own.

Attributes have the names of OpenTelemetry's conventions for generative AI and HTTP; what those have no name for begins
with ``helix.``.  No text of anybody's is among them.  Knows nothing about where spans go.
"""

import time
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from helix_gateway.core.event import SequenceMetrics
from helix_gateway.core.request import Request
from helix_gateway.gateway.state import Generation, RequestContext
from helix_gateway.telemetry.tracing import Phase, TracedRequest

PROVIDER = "helix"
_CARRIED = ("traceparent", "tracestate", "baggage")
_S = 1_000_000_000


def traced(request: web.Request, context: RequestContext, *, route: str, status: int) -> TracedRequest:
    """What tracing is told of a request that is over."""
    end_ns = time.time_ns()
    start_ns = end_ns - int(context.elapsed_ms * 1e6)
    attributes: dict[str, Any] = {
        "http.request.method": request.method,
        "http.route": route,
        "http.response.status_code": status,
        "helix.request_id": context.request_id,
    }
    name, phases = f"{request.method} {route}", []
    generation = context.generation
    if generation is not None:
        operation = "chat" if route == "/chat/completions" else "text_completion"
        name = f"{operation} {generation.model}"
        attributes |= {"gen_ai.operation.name": operation, **_of_generation(generation)}
        submitted_ns = start_ns + int((generation.submitted_s - context.started_s) * _S)
        phases = list(_phases(generation, submitted_ns))
    error = str(status) if status >= 500 or "exception_type" in context.log else None
    if error is not None:
        attributes["error.type"] = context.log.get("code") or context.log.get("exception_type") or error
    headers = {key: request.headers[key] for key in _CARRIED if key in request.headers}
    return TracedRequest(whole=Phase(name, start_ns, end_ns, attributes), phases=phases, headers=headers, error=error)


def _of_generation(generation: Generation) -> dict[str, Any]:
    asked, measured = generation.calls[0].request, list(generation.measured.values())
    attributes = {
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": generation.model,
        "gen_ai.response.model": generation.model,
        "gen_ai.response.id": generation.response_id,
        "gen_ai.response.finish_reasons": list(generation.finish_reasons),
        "gen_ai.request.stream": generation.stream,
        "gen_ai.usage.input_tokens": sum(len(call.request.prompt_token_ids) for call in generation.calls),
        "gen_ai.usage.output_tokens": sum(metrics.output_tokens for metrics in measured),
        "helix.draft_tokens": sum(metrics.draft_tokens for metrics in measured),
        "helix.accepted_tokens": sum(metrics.accepted_tokens for metrics in measured),
        **_of_sampling(asked),
    }
    if measured:
        attributes["gen_ai.usage.cache_read.input_tokens"] = measured[0].cached_tokens
    return attributes


def _of_sampling(asked: Request) -> dict[str, Any]:
    sampling = asked.sampling
    attributes = {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.choice.count": sampling.n,
        # A seed is 64 bits without a sign, an attribute 64 bits with one.
        "helix.seed": str(sampling.seed),
    }
    return {key: value for key, value in attributes.items() if value is not None}


def _phases(generation: Generation, submitted_ns: int) -> Iterator[Phase]:
    for choice, metrics in sorted(generation.measured.items()):
        yield from _phases_of(choice, metrics, submitted_ns)


def _phases_of(choice: int, metrics: SequenceMetrics, submitted_ns: int) -> Iterator[Phase]:
    started_ns = submitted_ns + int(metrics.queue_time_s * _S)
    yield Phase("queue", submitted_ns, started_ns, {"helix.choice": choice})
    if metrics.time_to_first_token_s is None:
        return
    first_ns = submitted_ns + int(metrics.time_to_first_token_s * _S)
    last_ns = submitted_ns + int(metrics.token_times_s[-1] * _S)
    prompt = {"helix.choice": choice, "helix.cached_tokens": metrics.cached_tokens}
    yield Phase("prefill", started_ns, first_ns, prompt)
    answer = {"helix.choice": choice, "gen_ai.usage.output_tokens": metrics.output_tokens}
    yield Phase("decode", first_ns, last_ns, answer)
