"""A real Chromium that can reach this machine alone, and a gateway over a fake service for it to look at.

`scripts/check.py` sees to the Chromium; by hand, any on the PATH will do.
"""

import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Error, async_playwright

from helix_gateway.gateway.addresses import bind
from helix_gateway.gateway.app import create_app
from helix_gateway.gateway.server import listening
from helix_gateway.gateway.settings import GatewaySettings

sys.path += [str(Path(__file__).parents[1] / "api"), str(Path(__file__).parents[2] / "scripts")]
from chromium import on_path
from fake_service import FakeService

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser():
    """The browser, once a module: each test gets a page without memory."""
    async with async_playwright() as playwright:
        try:
            started = await playwright.chromium.launch(executable_path=on_path(), args=FLAGS)
        except Error as error:
            pytest.fail(f"no Chromium starts here; `python3 scripts/check.py` gets one\n{error}", pytrace=False)
        yield started
        await started.close()


class Watched:
    """A page, with what went wrong on it and whom it asked."""

    def __init__(self, page):
        self.page = page
        self.complaints = []
        self.asked = []
        page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))


@pytest_asyncio.fixture(loop_scope="module")
async def open_page(browser):
    """Opens `/docs` of a server; at the end nobody but that server was asked, and nothing was complained about."""
    watched = []

    @asynccontextmanager
    async def open_page(url, **options):
        context = await browser.new_context(**options)
        page = Watched(await context.new_page())
        watched.append((url, page))
        await page.page.goto(url + "/docs")
        await page.page.wait_for_selector("body[data-ready]")
        yield page
        await context.close()

    yield open_page
    for url, page in watched:
        assert all(asked.startswith(url + "/") for asked in page.asked), page.asked
        assert page.complaints == []


@asynccontextmanager
async def gateway(service=None, **settings):
    """A gateway's URL and the service behind it."""
    settings = GatewaySettings(port=0, **settings)
    service = service or FakeService()
    app = create_app(settings, {"tiny": service})
    async with listening(app, settings, bind(settings)) as urls:
        yield urls[0], service


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served():
    async with gateway() as (url, _):
        yield url
