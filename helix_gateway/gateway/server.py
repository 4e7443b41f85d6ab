"""From an application and its sockets to a server: start, listen, serve, and stop in order.

Knows nothing about routes.
"""

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import structlog
from aiohttp import web

from helix_gateway.gateway.addresses import cannot_listen, close, urls
from helix_gateway.gateway.drain import drain
from helix_gateway.gateway.errors import to_api_error
from helix_gateway.gateway.keys import KeyFileError
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.gateway.state import DRAIN, KEYS, new_request_id
from helix_gateway.gateway.turns import quick_turns

BACKLOG = 1024

Start = Callable[[], Awaitable[object]]
"""Makes the services ready."""

_log = structlog.get_logger("helix.server")


class _Protocol(web.RequestHandler):
    """aiohttp's connection, but what is not even HTTP gets an answer in OpenAI's shape too."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer and close; the reason goes to the log, since it may quote what was sent."""
        request_id = new_request_id()
        _log.info("not understood", request_id=request_id, status=status, reason=type(exc).__name__)
        known = exc if status >= 500 and exc is not None else web.HTTPBadRequest(reason="This is not well-formed HTTP.")
        response = to_api_error(known, request_id=request_id, retry_after_s=0.0).response()
        response.headers["x-request-id"] = request_id
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    """aiohttp has no setting for the class of its connections: the server that it made is given another."""

    __slots__ = ()

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server
        return server


@asynccontextmanager
async def listening(
    app: web.Application, settings: GatewaySettings, sockets: Sequence[socket.socket]
) -> AsyncIterator[list[str]]:
    """Start the application on bound sockets; yields its URLs, stops it on the way out."""
    runner = _Runner(app, handler_cancellation=True, access_log=None, shutdown_timeout=settings.shutdown_timeout_s)
    try:
        await runner.setup()
        for sock in sockets:
            await _listen(runner, sock, settings)
        yield urls(sockets)
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, sock: socket.socket, settings: GatewaySettings) -> None:
    try:
        await web.SockSite(runner, sock, backlog=BACKLOG).start()
    except OSError as error:  # somebody else was quicker
        raise cannot_listen(settings, error) from error


async def serve(
    app: web.Application, settings: GatewaySettings, sockets: Sequence[socket.socket], start: Start
) -> None:
    """Serve until SIGINT or SIGTERM, then let what is in flight finish; a second one, or one while loading, ends it.

    Health and readiness are answered from the beginning; where to go is printed once ``start`` has come to its end.
    """
    stop = _Stop()
    _reread_keys_on_hangup(app)
    with suppress(asyncio.CancelledError):
        async with listening(app, settings, sockets) as where:
            await start()
            with quick_turns():
                # Told last: whoever hears it asks at once.
                sys.stdout.write(f"Helix listens on {' and '.join(where)}\n")
                sys.stdout.flush()
                await stop.first()
                await _drain(app, settings.drain_timeout_s)


class _Stop:
    """What SIGINT and SIGTERM do: the first asks, any other cancels the task that made this."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._asked: asyncio.Event | None = None
        with suppress(NotImplementedError):  # Windows has none: there Ctrl-C comes as KeyboardInterrupt
            for name in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(name, self._on_signal)

    def _on_signal(self) -> None:
        if self._asked is None or self._asked.is_set():
            self._task.cancel()
        else:
            self._asked.set()

    async def first(self) -> None:
        """Wait for the first; one before this ends the task."""
        self._asked = asyncio.Event()
        await self._asked.wait()


async def _drain(app: web.Application, timeout_s: float) -> None:
    in_flight = app[DRAIN].in_flight
    if in_flight:
        sys.stderr.write(
            f"helix: stopping; what is in flight ({in_flight}) has {timeout_s:g} s to finish, a second signal ends it now\n"
        )
        sys.stderr.flush()
    # Also with nothing in flight: who asks on a connection kept alive, before it is closed, is sent elsewhere.
    if left := await drain(app, timeout_s):
        sys.stderr.write(f"helix: {left} of {in_flight} did not finish in time and are cut off\n")


def _reread_keys_on_hangup(app: web.Application) -> None:
    def reread() -> None:
        try:
            app[KEYS].reload()
        except KeyFileError as error:
            _log.error("keys_not_reread", reason=str(error))
        else:
            _log.info("keys_reread", keys=len(app[KEYS]))

    if hasattr(signal, "SIGHUP"):
        with suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reread)


def run(app: web.Application, settings: GatewaySettings, sockets: Sequence[socket.socket], start: Start) -> int:
    """Start what is served, serve on bound sockets until told to stop, and answer with the exit code.

    What ``start`` raises ends the server and is raised here.
    """
    try:
        run_event_loop(serve(app, settings, sockets, start))
    except KeyboardInterrupt:
        return 130
    finally:
        close(sockets)
    return 0


def run_event_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` on uvloop where it is installed, otherwise on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)
