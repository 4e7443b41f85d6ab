"""A gateway over a fake service in a thread of the tests' process, for commands that are clients."""

import asyncio
import threading
import time

from helix_gateway.gateway.addresses import bind
from helix_gateway.gateway.app import create_app
from helix_gateway.gateway.server import listening
from helix_gateway.gateway.settings import GatewaySettings


class ServerThread:
    """``with ServerThread(FakeService()) as server: ... server.url``"""

    def __init__(self, service, **settings):
        self.service = service
        self.settings = GatewaySettings(port=0, shutdown_timeout_s=0.2, **settings)

    def __enter__(self):
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(30)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    async def _serve(self, started):
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        app = create_app(self.settings, {"tiny": self.service})
        async with listening(app, self.settings, bind(self.settings)) as urls:
            self.url = urls[0]
            started.set()
            await self._over.wait()

    def wait_until(self, condition, timeout_s=30.0):
        deadline = time.monotonic() + timeout_s
        while not condition(self.service):
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.005)
