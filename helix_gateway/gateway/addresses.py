"""The sockets that a gateway listens on: bound before anything else is done.

Imports nothing heavy: whoever starts a gateway learns first of a port in use.  Knows nothing about HTTP.
"""

import errno
import socket
import sys
from collections.abc import Sequence
from typing import Any

from helix_gateway.core.errors import HelixError
from helix_gateway.gateway.settings import GatewaySettings


class BindError(HelixError):
    """The address cannot be listened on; the message is one clear line."""


def bind(settings: GatewaySettings) -> list[socket.socket]:
    """Bind every address that the host name stands for, all on one port.

    Done before a model is fetched or loaded, so that a port in use is known at once.  Nobody can connect until
    `listening`: better refused than kept waiting.

    Raises:
        BindError: the port is in use or may not be used, or the host has no address here.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise BindError(f"The host {settings.host!r} has no address on this machine: {error.strerror}.") from error
    sockets: list[socket.socket] = []
    for family, _, _, _, address in dict.fromkeys(found):
        port = sockets[0].getsockname()[1] if sockets else settings.port
        try:
            sockets.append(_bound(family, (address[0], port, *address[2:])))
        except OSError as error:
            close(sockets)
            raise cannot_listen(settings, error) from error
    return sockets


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def close(sockets: Sequence[socket.socket]) -> None:
    """Close them all."""
    for sock in sockets:
        sock.close()


def cannot_listen(settings: GatewaySettings, error: OSError) -> BindError:
    """What the system's error means for whoever chose the address."""
    if error.errno == errno.EADDRINUSE:
        return BindError(f"Port {settings.port} on {settings.host} is in use; choose another with --port.")
    if error.errno == errno.EACCES:
        return BindError(
            f"Port {settings.port} may not be used without more rights; choose one above 1023 with --port."
        )
    return BindError(f"Cannot listen on {settings.host} port {settings.port}: {error.strerror}.")


def urls(sockets: Sequence[socket.socket]) -> list[str]:
    """Where the sockets listen, as people type it."""
    names = [sock.getsockname()[:2] for sock in sockets]
    return [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host, port in names]
