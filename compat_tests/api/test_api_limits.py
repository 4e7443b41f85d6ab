"""Limits: who asks too much, too often, too long or too large is told so before a token is spent."""

import asyncio
import json
import signal
import time

import aiohttp
import openai
import pytest
import structlog
from conftest import chat_body, running, until
from fake_service import FakeService

from helix_gateway.core.errors import QueueFullError
from helix_gateway.gateway.addresses import bind
from helix_gateway.gateway.app import create_app
from helix_gateway.gateway.errors import duration, wait
from helix_gateway.gateway.keys import KeyFileError, KeyRing
from helix_gateway.gateway.limits.bucket import Bucket
from helix_gateway.gateway.server import serve
from helix_gateway.gateway.settings import GatewaySettings

pytestmark = pytest.mark.alone

CHAT = "/v1/chat/completions"


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


async def forever(call):
    await asyncio.Event().wait()
    yield


async def refusal_of(response):
    """The message of a 429, checked for all that WIRE promises of one."""
    assert response.status == 429
    error = (await response.json())["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "rate_limit_exceeded", None)
    assert int(response.headers["Retry-After"]) >= 1
    assert int(response.headers["retry-after-ms"]) >= 1
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert response.headers["x-ratelimit-reset-requests"]
    assert "x-should-retry" not in response.headers
    return error["message"]


async def test_over_the_rate_is_429_and_costs_the_engine_nothing():
    async with running(rate_limit=3) as gateway:
        left = []
        for _ in range(3):
            async with gateway.post(CHAT, chat_body()) as response:
                assert response.status == 200
                assert response.headers["x-ratelimit-limit-requests"] == "3"
                left.append(response.headers["x-ratelimit-remaining-requests"])
        assert left == ["2", "1", "0"]
        async with gateway.post("/v1/completions", {"prompt": "a"}, headers={"Origin": "http://localhost"}) as response:
            assert "3 requests of a minute" in await refusal_of(response)
            assert 18 <= int(response.headers["Retry-After"]) <= 20
            assert "retry-after-ms" in response.headers["Access-Control-Expose-Headers"]
        assert len(gateway.service.calls) == 3
        async with gateway.get("/v1/models") as response:
            assert response.status == 200


async def test_each_key_has_a_rate_of_its_own():
    async with running(rate_limit=1, api_keys=("one", "two")) as gateway:
        statuses = []
        for key in ("one", "one", "two", "two", "wrong"):
            async with gateway.post(CHAT, chat_body(), headers=bearer(key)) as response:
                statuses.append(response.status)
        assert statuses == [200, 429, 200, 429, 401]


async def test_tokens_of_a_minute_run_out():
    async with running(token_rate_limit=20) as gateway:
        async with gateway.post(CHAT, chat_body()) as response:
            assert response.headers["x-ratelimit-remaining-tokens"] == "20"
        async with gateway.post(CHAT, chat_body()) as response:
            assert "20 tokens of a minute" in await refusal_of(response)


async def test_what_the_engine_refuses_costs_no_tokens():
    async def script(call):
        raise QueueFullError("The queue is full.", retry_after_s=1.0)
        yield

    async with running(token_rate_limit=20) as gateway:
        gateway.service.script = script
        for _ in range(3):
            async with gateway.post(CHAT, chat_body()) as response:
                assert await refusal_of(response) == "The queue is full."
                assert response.headers["x-ratelimit-remaining-tokens"] == "20"


async def test_a_key_with_too_many_requests_at_once_is_refused_until_one_ends():
    async with running(concurrency_limit=1, api_keys=("one", "two")) as gateway:
        gateway.service.script = forever
        asking = asyncio.create_task(gateway.answer(CHAT, chat_body(), headers=bearer("one")))
        await until(lambda: gateway.service.open)
        async with gateway.post(CHAT, chat_body(), headers=bearer("one")) as response:
            assert "at most 1 at once" in await refusal_of(response)
        asking.cancel()
        await until(lambda: not gateway.service.open)
        gateway.service.script = None
        for key in ("one", "two"):
            async with gateway.post(CHAT, chat_body(), headers=bearer(key)) as response:
                assert response.status == 200


async def test_who_asks_too_much_at_once_is_told_what_is_left_of_the_rate():
    async with running(concurrency_limit=1, rate_limit=9) as gateway:
        gateway.service.script = forever
        asking = asyncio.create_task(gateway.answer(CHAT, chat_body()))
        await until(lambda: gateway.service.open)
        async with gateway.post(CHAT, chat_body()) as response:
            assert response.status == 429
            assert response.headers["x-ratelimit-remaining-requests"] == "8"
            assert response.headers["Retry-After"]
        asking.cancel()
        await until(lambda: not gateway.service.open)


async def test_a_full_queue_is_429_with_the_same_headers(gateway):
    async def script(call):
        raise QueueFullError("The queue is full.", retry_after_s=1.5)
        yield

    gateway.service.script = script
    for stream in (False, True):
        async with gateway.post(CHAT, chat_body(stream=stream)) as response:
            assert await refusal_of(response) == "The queue is full."
            assert (response.headers["Retry-After"], response.headers["retry-after-ms"]) == ("2", "1500")


async def test_the_sdk_comes_again_when_it_is_told_to(gateway):
    full = [True]

    async def script(call):
        if full:
            full.pop()
            raise QueueFullError("The queue is full.", retry_after_s=0.2)
        async for delta in gateway.service._answer(call):
            yield delta

    gateway.service.script = script
    async with openai.AsyncOpenAI(base_url=gateway.url, api_key="x", max_retries=1) as client:
        started = time.monotonic()
        answer = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
    assert answer.choices[0].message.content
    assert 0.15 < time.monotonic() - started < 0.5


async def test_a_request_that_takes_too_long_ends_with_an_error_and_frees_its_blocks():
    async with running(request_timeout_s=0.1) as gateway:
        gateway.service.script = forever
        for stream in (False, True):
            async with gateway.post(CHAT, chat_body(stream=stream)) as response:
                assert response.status == 504
                assert response.headers["x-should-retry"] == "false"
                error = (await response.json())["error"]
            assert (error["type"], error["code"]) == ("server_error", "request_timeout")
            assert "0.1 s" in error["message"]
            assert gateway.service.open == 0
        gateway.service.script = None
        assert (await gateway.chat())["choices"][0]["finish_reason"] == "stop"


async def test_a_stream_that_takes_too_long_ends_with_an_error_event():
    service = FakeService("x" * 400, token_s=0.01)
    async with running(service, request_timeout_s=0.2) as gateway:
        events = await gateway.stream(CHAT, chat_body())
        assert len(events) > 5
        assert json.loads(events[-1])["error"]["code"] == "request_timeout"
        assert service.open == 0


async def test_a_body_that_is_never_finished_is_not_waited_for_for_ever():
    async with running(request_timeout_s=0.2) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 3)
        assert head.startswith(b"HTTP/1.1 504")
        writer.close()


async def test_a_client_that_stops_reading_does_not_hold_its_blocks_past_the_timeout(monkeypatch):
    monkeypatch.setattr("helix_gateway.gateway.sse.LAST_WORD_S", 0.1)

    async def endless(call):
        while True:
            async for delta in service._answer(call):
                yield type(delta)(index=0, text="x" * 10_000, token_ids=[1])

    service = FakeService()
    async with running(service, request_timeout_s=0.3) as gateway:
        service.script = endless
        body = json.dumps(chat_body(stream=True)).encode()
        _reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        writer.write(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)))
        writer.write(body)
        await until(lambda: service.open)
        await until(lambda: not service.open)
        writer.close()


async def test_a_body_over_the_limit_that_the_operator_set_is_413():
    async with running(max_body_bytes=2000) as gateway:
        status, body = await gateway.answer(CHAT, chat_body("x" * 3000))
        assert status == 413
        assert "2000" in body["error"]["message"]


async def test_the_log_names_whose_key_it_was_and_never_the_key(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# who may ask\n\nalice: sk-alice\nsk-nameless\n")
    with structlog.testing.capture_logs() as lines:
        async with running(api_keys=("sk-given",), api_key_file=str(path)) as gateway:
            for key in ("sk-alice", "sk-nameless", "sk-given"):
                async with gateway.post(CHAT, chat_body(), headers=bearer(key)) as response:
                    assert response.status == 200
    assert [line["api_key"] for line in lines if line["event"] == "request"] == ["alice", "line-4", "key-1"]
    assert "sk-" not in json.dumps(lines)


async def test_a_hangup_makes_the_server_read_its_keys_again(tmp_path):
    path = tmp_path / "keys"
    path.write_text("old: sk-old\n")
    settings = GatewaySettings(port=0, api_key_file=str(path))
    app = create_app(settings, {"tiny": FakeService()})
    (socket,) = bind(settings)
    url = f"http://127.0.0.1:{socket.getsockname()[1]}/v1/models"
    started = asyncio.Event()

    async def start():
        started.set()

    async def status_of(key):
        async with session.get(url, headers=bearer(key)) as response:
            return response.status

    serving = asyncio.create_task(serve(app, settings, [socket], start))
    await started.wait()
    async with aiohttp.ClientSession() as session:
        assert (await status_of("sk-old"), await status_of("sk-new")) == (200, 401)
        path.write_text("new: sk-new\n")
        signal.raise_signal(signal.SIGHUP)
        await asyncio.sleep(0.05)
        assert await status_of("sk-new") == 200
        assert await status_of("sk-old") == 401
        path.write_text("")
        signal.raise_signal(signal.SIGHUP)
        await asyncio.sleep(0.05)
        assert await status_of("sk-new") == 200
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("a: k\n: secret\n", "line 2"),
        ("name:\n", "line 1"),
        ("two secret words\n", "line 1"),
        ("a: secret\na: other\n", "two keys called a"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_told_by_line_and_never_by_key(tmp_path, text, said):
    path = tmp_path / "keys"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(KeyFileError, match=said) as caught:
        KeyRing((), str(path))
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_two_keys_never_have_one_name_wherever_they_come_from(tmp_path):
    path = tmp_path / "keys"
    path.write_text("key-2: secret\n")
    assert len(KeyRing(["given"], str(path))) == 2
    with pytest.raises(KeyFileError, match="two keys called key-2"):
        KeyRing(["given", "too"], str(path))


@pytest.mark.parametrize("place", ["missing", "."])
def test_a_file_of_keys_that_cannot_be_read_is_told(tmp_path, place):
    with pytest.raises(KeyFileError, match="cannot be read"):
        KeyRing((), str(tmp_path / place))


def test_a_bucket_fills_evenly_and_may_be_overdrawn():
    now = [0.0]
    bucket = Bucket(60, clock=lambda: now[0])
    assert (bucket.remaining, bucket.wait_s(1), bucket.reset_s) == (60, 0.0, 0.0)
    bucket.take(60)
    assert (bucket.remaining, bucket.wait_s(1)) == (0, 1.0)
    now[0] = 2.5
    assert (bucket.remaining, bucket.wait_s(1), bucket.reset_s) == (2, 0.0, 57.5)
    bucket.take(100)
    assert (bucket.remaining, bucket.wait_s(1)) == (0, 98.5)
    now[0] = 1000.0
    assert bucket.remaining == 60


def test_times_in_headers_are_never_too_short():
    assert wait(1.2) == {"Retry-After": "2", "retry-after-ms": "1200"}
    assert [duration(seconds) for seconds in (0.0201, 1.5, 60, 61.2)] == ["21ms", "1.5s", "1m0s", "1m2s"]
