"""Spans as a collector gets them: one a request, its phases under it, the client's trace above it."""

import asyncio
import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import structlog
from conftest import chat_body, running, until
from fake_service import FakeService, TextDelta
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from helix_gateway.core.event import SequenceMetrics
from helix_gateway.telemetry import tracing
from helix_gateway.telemetry.tracing import Tracer, open_tracer, traces_url

CHAT = "/v1/chat/completions"
CLIENT_TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
def tracer(spans):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Tracer(provider)


class PacedService(FakeService):
    """Answers with figures that a test can check."""

    async def _answer(self, call):
        await asyncio.sleep(0.01)
        figures = SequenceMetrics(
            queue_time_s=0.001,
            time_to_first_token_s=0.004,
            token_times_s=[0.004, 0.009],
            prompt_tokens=len(call.request.prompt_token_ids),
            output_tokens=2,
            cached_tokens=5,
            draft_tokens=4,
            accepted_tokens=1,
        )
        for index in range(call.request.sampling.n):
            yield TextDelta(index=index, text="ab", token_ids=[97, 98], finish_reason="length", metrics=figures)


async def test_a_request_is_a_span_with_its_phases_under_the_clients_trace(tracer, spans):
    async with running(PacedService(), tracer=tracer) as gateway:
        body = chat_body("the secret prompt", temperature=0.5, max_tokens=2, stop=["secret stop"])
        async with gateway.post(CHAT, body, headers={"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01"}) as answer:
            answered = await answer.json()
        async with gateway.get("/health"), gateway.get("/metrics"):
            pass
    *phases, whole = spans.get_finished_spans()
    assert (whole.name, whole.kind) == ("chat tiny", SpanKind.SERVER)
    assert f"{whole.context.trace_id:032x}" == CLIENT_TRACE
    assert f"{whole.parent.span_id:016x}" == CLIENT_SPAN
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    assert all(phase.parent.span_id == whole.context.span_id for phase in phases)
    assert [round((phase.end_time - phase.start_time) / 1e6) for phase in phases] == [1, 3, 5]
    assert whole.start_time <= phases[0].start_time
    assert phases[-1].end_time <= whole.end_time
    told = dict(whole.attributes)
    assert told["gen_ai.usage.input_tokens"] == answered["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == answered["usage"]["completion_tokens"] == 2
    assert told["gen_ai.usage.cache_read.input_tokens"] == 5
    assert told["gen_ai.response.id"] == answered["id"]
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.max_tokens"]) == (0.5, 2)
    assert (told["helix.draft_tokens"], told["helix.accepted_tokens"]) == (4, 1)
    assert (told["http.route"], told["http.response.status_code"]) == ("/chat/completions", 200)
    known = {value for value in vars(gen_ai_attributes).values() if isinstance(value, str)}
    assert {name for name in told if name.startswith("gen_ai.")} <= known
    assert "secret" not in json.dumps(told)


async def test_each_choice_has_its_phases(tracer, spans):
    async with running(PacedService(), tracer=tracer) as gateway:
        await gateway.stream("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 2})
    *phases, whole = spans.get_finished_spans()
    assert whole.name == "text_completion tiny"
    assert [(phase.name, phase.attributes["helix.choice"]) for phase in phases] == [
        (name, choice) for choice in range(4) for name in ("queue", "prefill", "decode")
    ]


async def test_failures_and_refusals_are_told_apart(tracer, spans):
    async with running(tracer=tracer) as gateway:
        await gateway.answer(CHAT, chat_body(temperature=3))
        gateway.service.state = "restarting"
        await gateway.answer(CHAT, chat_body())
        async with gateway.get("/v1/nonsense"):
            pass
    refused, failed, lost = spans.get_finished_spans()
    assert (refused.name, refused.status.status_code) == ("POST /chat/completions", StatusCode.UNSET)
    assert refused.attributes["http.response.status_code"] == 400
    assert failed.status.status_code == StatusCode.ERROR
    assert failed.attributes["error.type"] == "engine_unavailable"
    assert lost.name == "GET other"


async def test_a_client_that_leaves_has_a_span_too(tracer, spans):
    async def script(call):
        await asyncio.Event().wait()
        yield

    async with running(tracer=tracer) as gateway:
        gateway.service.script = script
        asking = asyncio.create_task(gateway.chat())
        await until(lambda: gateway.service.open)
        asking.cancel()
        await until(spans.get_finished_spans)
    (span,) = spans.get_finished_spans()
    assert span.attributes["http.response.status_code"] == 499


async def test_the_log_line_names_the_trace(tracer):
    headers = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01"}
    async with running(tracer=tracer) as gateway:
        with structlog.testing.capture_logs() as lines:
            async with gateway.get("/v1/models", headers=headers):
                pass
            await until(lambda: lines)
    assert lines[0]["trace_id"] == CLIENT_TRACE


def test_without_an_endpoint_there_is_no_tracer_and_nothing_is_imported(monkeypatch):
    for name in tracing._STANDARD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert open_tracer(None) is None
    code = (
        "import sys; import helix_gateway.gateway.app, helix_gateway.telemetry.tracing as t; assert t.open_tracer(None) is None;"
        "sys.exit(any(m.startswith('opentelemetry') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_library_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(tracing.TracingUnavailableError, match=r"pip install 'helix-gateway\[otel\]'"):
        open_tracer("http://127.0.0.1:4318")


@pytest.mark.parametrize("endpoint", ["http://host:4318", "http://host:4318/", "http://host:4318/v1/traces"])
def test_the_path_of_traces_is_added_where_it_is_missing(endpoint):
    assert traces_url(endpoint) == "http://host:4318/v1/traces"


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.taken.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


async def test_a_collector_gets_the_spans_when_the_server_stops():
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        server.taken = []
        thread = Thread(target=server.serve_forever)
        thread.start()
        async with running(tracer=open_tracer(f"http://127.0.0.1:{server.server_port}")) as gateway:
            await gateway.chat()
        server.shutdown()
        thread.join()
    (taken,) = server.taken
    assert taken[0] == "/v1/traces"
    assert b"chat tiny" in taken[1]
    assert b"helix" in taken[1]


async def test_a_collector_that_is_not_there_holds_up_neither_requests_nor_the_end():
    began = time.monotonic()
    async with running(tracer=open_tracer("http://127.0.0.1:9")) as gateway:
        await gateway.chat()
    assert time.monotonic() - began < 5
