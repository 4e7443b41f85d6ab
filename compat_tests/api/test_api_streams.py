"""How streams begin, wait, break and end: pings, trouble midway, clients that leave or read slowly."""

import asyncio
import gc
import json
import time

import pytest
from aiohttp.test_utils import make_mocked_request
from conftest import chat_body, events_of, running, until
from fake_service import FakeService

from helix_gateway.core.errors import EngineUnavailableError, QueueFullError
from helix_gateway.gateway import sse
from helix_gateway.gateway.limits.time import TimeLimit
from helix_gateway.service.api import TextDelta

pytestmark = pytest.mark.alone

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
STREAMS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


def body_for(path, **fields):
    return {"prompt": "a", **fields} if path == COMPLETIONS else chat_body(**fields)


def forever(text="x", pause_s=0.001):
    async def script(call):
        while True:
            yield TextDelta(index=0, text=text, token_ids=[1])
            await asyncio.sleep(pause_s)

    return script


async def wait_forever(call):
    await asyncio.Event().wait()
    yield


@STREAMS
async def test_headers_keep_proxies_from_buffering(gateway, path):
    async with gateway.post(path, body_for(path, stream=True)) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["x-request-id"]
        assert response.headers["openai-processing-ms"].isdigit()
        assert response.headers["x-helix-seed"]
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_a_stream_leaves_nothing_for_the_garbage_collector(gateway):
    """A collection of what requests left holds up every stream for milliseconds."""
    async with gateway.post(CHAT, body_for(CHAT, stream=True)) as response:
        await response.read()
    found = []

    def note(phase, info):
        if phase == "stop":
            found.append(info["collected"])

    gc.collect()
    gc.disable()
    gc.callbacks.append(note)
    try:
        for _ in range(20):
            async with gateway.post(CHAT, body_for(CHAT, stream=True)) as response:
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
        gc.collect()
    finally:
        gc.callbacks.remove(note)
        gc.enable()
    assert found[0] < 20 * 20


async def first_packet(gateway):
    """What a stream's client reads at once."""
    body = json.dumps(chat_body(stream=True)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    packet = await reader.read(65536)
    writer.close()
    await writer.wait_closed()
    return packet


async def test_the_head_comes_in_one_packet_with_the_first_event(gateway):
    packet = await first_packet(gateway)
    assert packet.startswith(b"HTTP/1.1 200")
    assert b"data: {" in packet


async def test_the_end_comes_in_one_packet_with_the_last_event():
    async with running(FakeService("x")) as gateway:
        packet = await first_packet(gateway)
    assert packet.startswith(b"HTTP/1.1 200")
    assert b'"finish_reason":"stop"' in packet
    assert packet.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


class Unread:
    """A stream that was asked for and never began; `service.open` counts those that are not closed."""

    def __init__(self, service, closing_fails):
        self.service, self.closing_fails = service, closing_fails
        service.open += 1

    async def aclose(self):
        self.service.open -= 1
        if self.closing_fails:
            raise ZeroDivisionError


class Goes(FakeService):
    """Is gone once it has been asked for two streams."""

    def __init__(self, *, closing_fails=False):
        super().__init__()
        self.closing_fails = closing_fails

    def generate(self, call):
        if len(self.calls) == 2:
            raise EngineUnavailableError("gone")
        self.calls.append(call)
        return Unread(self, self.closing_fails)


async def test_an_engine_that_goes_while_it_is_asked_keeps_no_part_of_the_request():
    async with running(Goes()) as gateway:
        status, body = await gateway.answer(COMPLETIONS, {"prompt": ["a", "b", "c"]})
    assert (status, body["error"]["code"]) == (503, "engine_unavailable")
    assert (len(gateway.service.calls), gateway.service.open) == (2, 0)


async def test_a_stream_that_cannot_be_closed_keeps_no_other_open():
    async with running(Goes(closing_fails=True)) as gateway:
        status, _ = await gateway.answer(COMPLETIONS, {"prompt": ["a", "b", "c"]})
    assert (status, len(gateway.service.calls), gateway.service.open) == (500, 2, 0)


async def test_a_request_that_cannot_be_told_of_keeps_no_stream_open(monkeypatch):
    def fails(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("helix_gateway.gateway.exchange.Generation", fails)
    async with running(Goes()) as gateway:
        status, _ = await gateway.answer(COMPLETIONS, {"prompt": ["a", "b"]})
    assert (status, len(gateway.service.calls), gateway.service.open) == (500, 2, 0)


async def test_silence_is_broken_by_comments():
    async def script(call):
        await asyncio.sleep(0.25)
        yield TextDelta(index=0, text="a", token_ids=[1])
        await asyncio.sleep(0.25)
        yield TextDelta(index=0, text="b", token_ids=[1], finish_reason="stop")

    async with running(ping_interval_s=0.1) as gateway:
        gateway.service.script = script
        async with gateway.post(CHAT, chat_body(stream=True)) as response:
            payload = (await response.read()).decode()
    before, between = payload.split('"a"')[0], payload.split('"a"')[1].split('"b"')[0]
    assert before.startswith(": ping\n\n")
    assert 1 <= before.count(": ping\n\n") <= 2
    assert 1 <= between.count(": ping\n\n") <= 2
    assert payload.endswith("data: [DONE]\n\n")


class PingsWait:
    """A response to a client that leaves no room for pings, but for the small events between them."""

    prepared = True

    def __init__(self):
        self.num_pings = self.num_ended = 0
        self.num_waiting_at_end = None

    async def write(self, payload):
        if payload == sse.PING:
            self.num_pings += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.num_ended += 1

    async def write_eof(self, data=b""):
        self.num_waiting_at_end = self.num_pings - self.num_ended


async def test_a_ping_that_waits_for_the_client_is_the_only_one_and_ends_with_the_stream():
    async def events():
        for _ in range(3):
            yield b"data: a\n\n"
            await asyncio.sleep(0.2)

    stream = sse.EventStream(make_mocked_request("GET", "/"), TimeLimit(), 0.02)
    stream._response = response = PingsWait()
    await stream.run(events(), explain=None)
    assert (response.num_pings, response.num_ended, response.num_waiting_at_end) == (1, 1, 0)


class EndsSlowly:
    """A response to a client that takes its time over the end, or for ever."""

    prepared = True

    def __init__(self, takes_s):
        self.takes_s = takes_s
        self.written = []

    async def write(self, payload):
        self.written.append(payload)

    async def write_eof(self, data=b""):
        await self.write(data)
        await asyncio.sleep(self.takes_s)


async def test_no_comment_follows_the_end_while_it_waits_for_the_client():
    async def events():
        await asyncio.sleep(0.1)
        yield sse.DONE

    stream = sse.EventStream(make_mocked_request("GET", "/"), TimeLimit(), 0.02)
    stream._response = response = EndsSlowly(0.1)
    await stream.run(events(), explain=None)
    assert sse.PING in response.written
    assert (response.written[-1], stream.answered) == (sse.DONE, True)


async def test_an_end_that_is_not_read_in_time_is_not_waited_for_and_answers_nothing(monkeypatch):
    async def events():
        yield b"data: a\n\n" + sse.DONE

    monkeypatch.setattr(sse, "LAST_WORD_S", 0.05)
    request = make_mocked_request("GET", "/")
    stream = sse.EventStream(request, TimeLimit(0.01), 15.0)
    stream._response = EndsSlowly(60.0)
    await asyncio.wait_for(stream.run(events(), explain=None), 3)
    assert (stream.answered, stream.client_left) == (False, True)
    request.transport.abort.assert_called_once_with()


async def test_a_stream_that_speaks_gets_no_comments():
    async with (
        running(FakeService("x" * 60, token_s=0.005), ping_interval_s=0.2) as gateway,
        gateway.post(CHAT, chat_body(stream=True)) as response,
    ):
        assert b": ping" not in await response.read()


@STREAMS
@pytest.mark.parametrize(
    "error, status, code",
    [
        (QueueFullError("Full.", retry_after_s=2.0), 429, "rate_limit_exceeded"),
        (EngineUnavailableError("Dead."), 503, "engine_unavailable"),
        (ZeroDivisionError("secret"), 500, None),
    ],
)
async def test_trouble_before_the_first_byte_is_a_plain_error(gateway, path, error, status, code):
    async def script(call):
        raise error
        yield

    gateway.service.script = script
    for stream in (True, False):
        async with gateway.post(path, body_for(path, stream=stream)) as response:
            assert response.status == status
            assert response.content_type == "application/json"
            assert (await response.json())["error"]["code"] == code


@STREAMS
@pytest.mark.parametrize(
    "delta_or_error, code",
    [
        (EngineUnavailableError("The engine died."), "engine_unavailable"),
        (TextDelta(index=0, text="", token_ids=[], finish_reason="error", error="Out of pages."), None),
        (TextDelta(index=0, text="", token_ids=[], finish_reason="abort"), "engine_unavailable"),
        (None, "engine_unavailable"),
    ],
    ids=["engine death", "sequence error", "abort", "ends unfinished"],
)
async def test_trouble_after_the_first_byte_is_an_event_and_no_done(gateway, path, delta_or_error, code):
    async def script(call):
        yield TextDelta(index=0, text="a", token_ids=[1])
        if isinstance(delta_or_error, Exception):
            raise delta_or_error
        if delta_or_error is not None:
            yield delta_or_error

    gateway.service.script = script
    events = await gateway.stream(path, body_for(path))
    assert "[DONE]" not in events
    error = json.loads(events[-1])["error"]
    assert (error["type"], error["code"]) == ("server_error", code)
    assert set(error) == {"message", "type", "param", "code"}
    status, body = await gateway.answer(path, body_for(path))
    assert (status, body["error"]["code"]) == (503 if code else 500, code)
    assert gateway.service.open == 0


@STREAMS
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [forever(), wait_forever], ids=["while it speaks", "before it speaks"])
async def test_a_client_that_goes_away_closes_its_generator(gateway, path, stream, script):
    gateway.service.script = script
    asking = asyncio.create_task(_read_all(gateway, path, body_for(path, stream=stream)))
    await until(lambda: gateway.service.open == 1)
    await asyncio.sleep(0.02)
    asking.cancel()
    started = time.monotonic()
    await until(lambda: gateway.service.open == 0)
    assert time.monotonic() - started < 0.5


async def _read_all(gateway, path, body):
    async with gateway.post(path, body) as response:
        await response.read()


async def test_a_client_that_goes_away_closes_the_generators_of_all_its_prompts(gateway):
    gateway.service.script = forever()
    asking = asyncio.create_task(_read_all(gateway, COMPLETIONS, {"prompt": ["a", "b", "c"], "stream": True}))
    await until(lambda: gateway.service.open == 3)
    asking.cancel()
    await until(lambda: gateway.service.open == 0)


async def test_a_slow_reader_is_held_at_a_bounded_buffer_and_holds_up_nobody():
    piece = "y" * 1000
    async with running(FakeService()) as gateway:
        gateway.service.script = forever(piece, pause_s=0)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        writer.write(_raw_post(CHAT, chat_body(stream=True)))
        await until(lambda: gateway.service.deltas > 10)
        await _until_still(lambda: gateway.service.deltas)
        held = gateway.service.deltas
        assert held * len(piece) < 16 * 2**20
        gateway.service.script = None
        started = time.monotonic()
        await gateway.chat()
        assert time.monotonic() - started < 0.5
        for _ in range(200):
            assert await reader.read(65536)
        await until(lambda: gateway.service.deltas > held + 20)
        writer.transport.abort()
        await until(lambda: gateway.service.open == 0)


async def _until_still(value):
    last, still_since = value(), time.monotonic()
    while time.monotonic() - still_since < 0.2:
        await asyncio.sleep(0.01)
        if value() != last:
            last, still_since = value(), time.monotonic()


async def test_a_client_that_leaves_while_it_is_held_closes_its_generator():
    async with running(FakeService(), ping_interval_s=0.05) as gateway:
        gateway.service.script = forever("y" * 1000, pause_s=0)
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        writer.write(_raw_post(CHAT, chat_body(stream=True)))
        await until(lambda: gateway.service.deltas > 10)
        await _until_still(lambda: gateway.service.deltas)
        writer.transport.abort()
        await until(lambda: gateway.service.open == 0)


def _raw_post(path, body):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def test_tokens_are_sent_as_they_come(gateway):
    gate = asyncio.Event()

    async def script(call):
        yield TextDelta(index=0, text="first", token_ids=[1])
        await gate.wait()
        yield TextDelta(index=0, text="second", token_ids=[1], finish_reason="stop")

    gateway.service.script = script
    async with gateway.post(CHAT, chat_body(stream=True)) as response:
        seen = b""
        while b"first" not in seen:
            seen += await asyncio.wait_for(response.content.readany(), 2)
        gate.set()
        seen += await response.read()
    assert len(events_of(seen)) == 5


async def test_sixteen_streams_at_once_each_get_their_own():
    async with running(FakeService("x" * 20, token_s=0.001)) as gateway:
        streams = [gateway.stream(COMPLETIONS, {"prompt": str(i), "echo": True, "max_tokens": 99}) for i in range(16)]
        for index, events in enumerate(await asyncio.gather(*streams)):
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
            assert text == f"{index}{'x' * 20}"


async def test_the_end_of_the_server_ends_its_streams():
    async with running(FakeService(), shutdown_timeout_s=0.1) as gateway:
        service = gateway.service
        service.script = forever()
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(_raw_post(CHAT, chat_body(stream=True)))
        await until(lambda: service.open == 1)
    assert service.open == 0
    assert b"[DONE]" not in await asyncio.wait_for(reader.read(), 3)
    writer.close()
