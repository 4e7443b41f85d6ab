"""A gateway on a real socket over a fake service."""

import asyncio
import io
import json
import time
from contextlib import asynccontextmanager

import aiohttp
import pytest
import structlog
from fake_service import FakeService

from helix_gateway.gateway.addresses import bind
from helix_gateway.gateway.app import create_app
from helix_gateway.gateway.server import listening
from helix_gateway.gateway.settings import GatewaySettings


@pytest.fixture(autouse=True)
def plain_logs():
    """Log lines in their simplest form, so that a failing test shows them and a passing one loses no time."""
    structlog.configure(processors=[structlog.processors.add_log_level, structlog.processors.KeyValueRenderer()])
    yield
    structlog.reset_defaults()


class Gateway:
    """What a test holds: the service behind, the URL, and a session to ask with."""

    def __init__(self, url, session, service):
        self.url, self.session, self.service = url, session, service
        self.port = int(url.rsplit(":", 1)[1])

    def post(self, path, body, **options):
        content = {"data": io.BytesIO(body)} if isinstance(body, bytes) else {"json": body}
        return self.session.post(self.url + path, **content, **options)

    def get(self, path, **options):
        return self.session.get(self.url + path, **options)

    async def answer(self, path, body, **options):
        """Status and JSON of one POST."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.post(path, body, **options) as response:
            return response.status, await response.json()

    async def chat(self, **fields):
        """The body of one successful chat answer."""
        status, body = await self.answer("/v1/chat/completions", chat_body(**fields))
        assert status == 200, body
        return body

    async def stream(self, path, body):
        """All events of one stream, as text."""
        async with self.post(path, {**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            return events_of(await response.read())


async def until(condition, timeout_s=3.0):
    """Wait until ``condition()`` holds, but not for long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


def chat_body(text="Hi", **fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}


def events_of(payload: bytes) -> list[str]:
    """The data of each event; comments are left out."""
    blocks = payload.decode().split("\n\n")
    assert blocks.pop() == ""
    return [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]


@asynccontextmanager
async def running(service=None, models=None, tracer=None, **settings):
    settings = GatewaySettings(port=0, **settings)
    service = service or FakeService()
    app = create_app(settings, models or {"tiny": service}, tracer=tracer)
    async with listening(app, settings, bind(settings)) as urls, aiohttp.ClientSession() as session:
        yield Gateway(urls[0], session, service)


@pytest.fixture
async def gateway():
    async with running() as started:
        yield started
