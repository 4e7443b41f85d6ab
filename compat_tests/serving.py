"""Starts and stops a real `helix serve`, as a person would, and keeps what it says.  Knows nothing about who asks it."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field

READY_TIMEOUT_S = 120


@dataclass
class Server:
    """A `helix serve` process."""

    process: subprocess.Popen
    url: str = ""
    lines: list = field(default_factory=list)

    @property
    def base_url(self):
        return self.url + "/v1"


def start_server(*arguments, timeout_s=READY_TIMEOUT_S):
    """Start `helix serve` on a free port and wait until it says where it listens."""
    command = [sys.executable, "-m", "helix_gateway", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    server = Server(process)
    listening = threading.Event()

    def read():
        with process.stdout:
            for line in process.stdout:
                server.lines.append(line.rstrip())
                found = re.search(r"http://127\.0\.0\.1:\d+", line)
                if found and not server.url:
                    server.url = found[0]
                    listening.set()
        listening.set()

    threading.Thread(target=read, daemon=True).start()
    listening.wait(timeout_s)
    if not server.url:
        process.kill()
        process.wait()
        raise AssertionError("helix serve did not come up:\n" + "\n".join(server.lines))
    return server


def stop_server(server):
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return server.process.wait(20)
    server.process.kill()
    raise AssertionError("helix serve did not end on SIGTERM:\n" + "\n".join(server.lines[-20:]))
