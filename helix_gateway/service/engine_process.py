"""The engine in a process of its own, started by `engine_process_main`.

Started by exec, never by fork (`launch.py`).  Its last argument says which socket leads to the gateway, the first line
of its standard input what to load; the rest of that pipe says nothing, but its end means that the parent is gone, and
then so is this process.  Knows nothing about models, nor about what the gateway asks once one is loaded.
"""

import gc
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from importlib import import_module

import msgspec
import structlog

from helix_gateway.core.errors import HelixError
from helix_gateway.service.gateway_link import GatewayLink
from helix_gateway.service.messages import LoadFailed, Ready
from helix_gateway.service.parent import EXIT_ORPHANED, end_with_parent
from helix_gateway.service.settings import EngineSettings
from helix_gateway.telemetry.logging import configure_engine_logging

log = structlog.get_logger(__name__)


def main() -> None:
    """Read the assignment, load, serve until the parent goes away."""
    # Ctrl-C, and a service manager's SIGTERM, reach the whole group; when to stop is the gateway's decision, which
    # comes as the end of the pipe.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    # What takes longest goes on while nobody has said yet what to load.
    imports = threading.Thread(target=_import_what_is_heavy, name="imports", daemon=True)
    imports.start()
    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(EXIT_ORPHANED)
    threading.Thread(target=end_with_parent, name="parent-watch", daemon=True).start()
    # Two threads never import at once: what imports in a circle would be seen half made.
    imports.join()
    settings = msgspec.json.decode(line, type=EngineSettings)
    configure_engine_logging(settings.log)
    connection = socket.socket(fileno=int(sys.argv[-1]))
    connection.set_inheritable(False)
    link = GatewayLink(connection)
    served = _serve(settings, link)
    link.close()
    if not served:
        sys.exit(1)


def _import_what_is_heavy() -> None:
    # Hundreds of thousands of objects are made, and none of them is garbage: looking for some again and again takes a
    # sixth of the time.  Nor is it looked for among them later.
    gc.disable()
    try:
        # What goes wrong here goes wrong again where the parent can be told.
        with suppress(Exception):
            import_module("helix_gateway.service.host")
        gc.freeze()
    finally:
        gc.enable()


def _serve(settings: EngineSettings, link: GatewayLink) -> bool:
    """Load and serve; False if the model cannot be loaded."""
    # Imported here: what is heavy is loaded once the parent can already be told of trouble.
    try:
        from helix_gateway.service.host import EngineHost
        from helix_gateway.service.loop import run_loop

        host = EngineHost(settings)
    except HelixError as error:
        link.tell(LoadFailed(str(error)))
        return False
    except Exception as error:
        log.exception("load_failed")
        reason = (str(error).splitlines() or [""])[0]
        link.tell(LoadFailed(f"The model could not be loaded: {type(error).__name__}: {reason}"))
        return False
    link.tell(Ready(host.max_model_len, host.vocab_size))
    try:
        run_loop(host, link, link.tell, batch_window_s=settings.batch_window_ms / 1e3)
    finally:
        host.close()
    return True
