"""A client that goes away, through a real socket and a real engine: its blocks come back."""

import asyncio
import contextlib

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
async def gateway(service):
    runner = web.AppRunner(create_app(GatewaySettings(), {"m": service}), handler_cancellation=True)
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
