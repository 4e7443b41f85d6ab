"""Who may drive this server from a browser: rules over `Origin` and `Host`, as pure functions.

A web page that someone visits reaches a server on that person's machine; it must not drive their models.  So
only loopback pages, desktop apps and origins named by the operator are let in, and a server on loopback answers
only to loopback names (a page whose name was rebound to 127.0.0.1 carries its own name in `Host`).  Knows nothing
about responses.
"""

import ipaddress
from collections.abc import Collection
from functools import lru_cache
from urllib.parse import urlsplit

APP_SCHEMES = frozenset({"app", "tauri", "file", "vscode-webview"})
CONTAINER_HOST = "host.docker.internal"
"""How a container calls the machine it runs on; the name is reserved, so nobody can rebind it."""
ANY = "*"


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def origin_allowed(
    origin: str, host_header: str | None, allowed: Collection[str], own_names: Collection[str] = ()
) -> bool:
    """Whether a page of ``origin`` may use the server: by rule, by name, or because the server itself served it.

    The last holds only under a name that nobody can rebind; ``own_names`` are those that the operator vouches for.
    """
    if ANY in allowed or origin.rstrip("/") in {name.rstrip("/") for name in allowed}:
        return True
    try:
        parts = urlsplit(origin)
        hostname = parts.hostname or ""
    except ValueError:
        return False
    if parts.scheme in APP_SCHEMES:
        return True
    if parts.scheme not in ("http", "https"):
        return False
    same = host_header is not None and parts.netloc.lower() == host_header.lower()
    return is_loopback(hostname) or (same and (is_local(hostname) or named(hostname, own_names)))


def is_local(host: str) -> bool:
    """Whether a host is an address or a name of the local network: no stranger's name server answers for it."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return "." not in host.rstrip(".") or host.rstrip(".").lower().endswith(".local")
    return True


def named(host: str, names: Collection[str]) -> bool:
    """Whether a host is among names that an operator wrote, in whatever case."""
    return host.lower() in {name.lower() for name in names}


def host_allowed(host_header: str | None, listening_on: str, allowed: Collection[str]) -> bool:
    """Whether a request under that `Host` is meant for this server; only a loopback listener asks."""
    if host_header is None or not is_loopback(listening_on) or ANY in allowed:
        return True
    hostname = _hostname(host_header)
    if hostname is None:
        return False
    return is_loopback(hostname) or hostname == CONTAINER_HOST or named(hostname, allowed)


@lru_cache(maxsize=256)
def _hostname(host_header: str) -> str | None:
    """The name in a `Host`, without its port; None where it is none."""
    try:
        return urlsplit(f"//{host_header}").hostname or ""
    except ValueError:
        return None
