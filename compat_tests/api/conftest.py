"""A gateway on a real socket over a fake service."""

from contextlib import asynccontextmanager

import aiohttp
import pytest
from fake_service import FakeService

from helix_gateway.gateway.app import create_app
from helix_gateway.gateway.server import bind, listening
from helix_gateway.gateway.settings import GatewaySettings


class Gateway:
    """What a test holds: the service behind, the URL, and a session to ask with."""

    def __init__(self, url, session, service):
        self.url, self.session, self.service = url, session, service

    def post(self, path, body, **options):
        key = "data" if isinstance(body, bytes) else "json"
        return self.session.post(self.url + path, **{key: body}, **options)

    def get(self, path, **options):
        return self.session.get(self.url + path, **options)

    async def answer(self, path, body, **options):
        """Status and JSON of one POST."""
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


def chat_body(text="Hi", **fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}


def events_of(payload: bytes) -> list[str]:
    """The data of each event; comments are left out."""
    blocks = payload.decode().split("\n\n")
    assert blocks.pop() == ""
    return [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]


@asynccontextmanager
async def running(service=None, models=None, **settings):
    settings = GatewaySettings(port=0, **settings)
    service = service or FakeService()
    app = create_app(settings, models or {"tiny": service})
    async with listening(app, settings, bind(settings)) as urls, aiohttp.ClientSession() as session:
        yield Gateway(urls[0], session, service)


@pytest.fixture
async def gateway():
    async with running() as started:
        yield started
