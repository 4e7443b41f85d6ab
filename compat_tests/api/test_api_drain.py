"""Stopping: what is in flight finishes, what is new is sent elsewhere, and who insists is obeyed at once."""

import asyncio
import signal
import time
from contextlib import asynccontextmanager

import aiohttp
import pytest
from conftest import Gateway, chat_body, events_of, until
from fake_service import FakeService

from helix_gateway.gateway.addresses import bind
from helix_gateway.gateway.app import create_app
from helix_gateway.gateway.server import _drain, serve
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.gateway.state import DRAIN

pytestmark = pytest.mark.alone

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def serving(service, **settings):
    """A gateway that obeys signals; yields it and the task that serves."""
    settings = GatewaySettings(port=0, **settings)
    app = create_app(settings, {"tiny": service})
    (socket,) = bind(settings)
    started = asyncio.Event()

    async def start():
        started.set()

    task = asyncio.create_task(serve(app, settings, [socket], start))
    await started.wait()
    await asyncio.sleep(0)
    async with aiohttp.ClientSession() as session:
        yield Gateway(f"http://127.0.0.1:{socket.getsockname()[1]}", session, service), task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def read_stream(gateway):
    async with gateway.post(CHAT, chat_body(stream=True)) as response:
        return events_of(await response.read())


async def test_who_asks_on_a_connection_kept_alive_is_sent_elsewhere_though_nothing_is_in_flight():
    app = create_app(GatewaySettings(port=0), {"tiny": FakeService()})
    await _drain(app, 1.0)
    assert app[DRAIN].draining


async def test_streams_in_flight_finish_while_new_requests_are_sent_elsewhere(capsys):
    service = FakeService("x" * 40, token_s=0.02)
    async with serving(service) as (gateway, task):
        streams = [asyncio.create_task(read_stream(gateway)) for _ in range(3)]
        await until(lambda: service.open == 3)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        async with gateway.post(CHAT, chat_body(), headers={"Origin": "http://localhost"}) as response:
            assert response.status == 503
            assert response.headers["Retry-After"]
            assert response.headers["Connection"] == "close"
            assert response.headers["Access-Control-Allow-Origin"] == "http://localhost"
            assert (await response.json())["error"]["code"] == "engine_unavailable"
        async with gateway.get("/ready") as response:
            assert response.status == 503
            assert (await response.json())["status"] == "draining"
        for path in ("/health", "/metrics"):
            async with gateway.get(path) as response:
                assert response.status == 200
        for events in await asyncio.gather(*streams):
            assert events[-1] == "[DONE]"
        await asyncio.wait_for(task, 5)
    assert len(service.calls) == 3
    assert "in flight (3)" in capsys.readouterr().err


async def test_an_idle_server_stops_at_once(capsys):
    async with serving(FakeService()) as (gateway, task):
        await gateway.chat()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.wait_for(task, 3)
    assert "in flight" not in capsys.readouterr().err


async def test_what_does_not_finish_in_time_is_cut_off(capsys):
    service = FakeService("x" * 400, token_s=0.02)
    async with serving(service, drain_timeout_s=0.1, shutdown_timeout_s=0.1) as (gateway, task):
        stream = asyncio.create_task(read_stream(gateway))
        await until(lambda: service.open)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.wait_for(task, 3)
        await asyncio.gather(stream, return_exceptions=True)
        assert service.open == 0
    assert "1 of 1 did not finish" in capsys.readouterr().err


async def test_a_second_signal_ends_it_at_once():
    service = FakeService("x" * 400, token_s=0.02)
    async with serving(service, shutdown_timeout_s=0.1) as (gateway, task):
        stream = asyncio.create_task(read_stream(gateway))
        await until(lambda: service.open)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        assert not task.done()
        told = time.monotonic()
        signal.raise_signal(signal.SIGINT)
        await asyncio.wait_for(task, 3)
        assert time.monotonic() - told < 1
        await asyncio.gather(stream, return_exceptions=True)


async def test_a_request_that_is_not_a_stream_finishes_too():
    service = FakeService("x" * 10, token_s=0.02)
    async with serving(service) as (gateway, task):
        asking = asyncio.create_task(gateway.answer(CHAT, chat_body()))
        await until(lambda: service.open)
        signal.raise_signal(signal.SIGTERM)
        status, body = await asking
        assert (status, body["choices"][0]["message"]["content"]) == (200, "x" * 10)
        await asyncio.wait_for(task, 3)
