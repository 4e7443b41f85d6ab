"""Clients that go away, take too long or are too many, through a real socket and a real engine: blocks come back."""

import asyncio
import contextlib
import dataclasses

import aiohttp
import pytest
from aiohttp import web

from helix_gateway.gateway.app import create_app
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.service.in_process import InProcessService
from helix_gateway.service.settings import EngineSettings

GONE_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def service(smollm2_path):
    made = InProcessService(EngineSettings(model_path=smollm2_path, kv_cache_memory_bytes=256 << 20))
    yield made
    made.close()


@contextlib.asynccontextmanager
async def gateway(service, **settings):
    runner = web.AppRunner(create_app(GatewaySettings(**settings), {"m": service}), handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}/v1/completions"
    finally:
        await runner.cleanup()


async def until(condition):
    deadline = asyncio.get_running_loop().time() + GONE_WITHIN_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_has_its_blocks_back(service, stream):
    engine = service.host.engine
    body = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "n": 2, "stream": stream}
    async with gateway(service) as url, aiohttp.ClientSession() as session:
        asked = asyncio.create_task(session.post(url, json=body))
        await until(lambda: engine.num_running == 2)
        if stream:
            response = await asked
            await response.content.readline()
            response.close()
        else:
            asked.cancel()
        await until(lambda: engine.cache.pool.num_referenced == 0)
        assert engine.num_running == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_takes_too_long_has_its_blocks_taken_back(service, stream):
    engine = service.host.engine
    body = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    async with gateway(service, request_timeout_s=0.5) as url, aiohttp.ClientSession() as session:
        async with session.post(url, json=body) as response:
            assert response.status in ((200, 504) if stream else (504,))
            assert "request_timeout" in await response.text()
        await until(lambda: engine.cache.pool.num_referenced == 0)


async def test_a_queue_that_is_full_is_429_and_those_before_are_served(monkeypatch, service):
    engine = service.host.engine
    monkeypatch.setattr(engine, "_limits", dataclasses.replace(engine._limits, max_num_seqs=4, max_queue_len=0))
    body = {"prompt": "Once upon a time", "max_tokens": 4, "ignore_eos": True}
    async with gateway(service) as url, aiohttp.ClientSession() as session:

        async def ask():
            async with session.post(url, json=body) as response:
                return response.status, response.headers.get("retry-after-ms")

        answers = await asyncio.gather(*(ask() for _ in range(16)))
    assert {status for status, _ in answers} == {200, 429}
    assert sum(status == 200 for status, _ in answers) >= 4
    assert all(wait_ms for status, wait_ms in answers if status == 429)
