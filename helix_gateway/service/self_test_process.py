"""The self-test, run in a process of its own as an engine is, and heard until it ends, however it ends.

Imports neither torch nor numpy: the process that runs the test does.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO

import msgspec

from helix_gateway.service.findings import Finding

_NAME = "self-test"
SELF_TEST = (sys.executable, "-m", "helix_gateway.service.self_test")


def run_self_test(timeout_s: float, command: Sequence[str] = SELF_TEST) -> Iterator[Finding]:
    """Yield the findings of `self_test` as they come; a death or a hang of its process is one more."""
    from helix_gateway.runtime.cpu.threads import engine_environment

    with tempfile.TemporaryFile() as said:
        environment = {**os.environ, **engine_environment()}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, env=environment
        )
        hung = threading.Event()
        watch = threading.Timer(timeout_s, _end, (process, hung))
        watch.start()
        try:
            assert process.stdout is not None
            yield from _findings_of(process.stdout)
            code = process.wait()
        finally:
            watch.cancel()
            process.kill()
            process.wait()
        if hung.is_set():
            yield _hung(timeout_s)
        elif code != 0:
            yield _died(code, said)


def _end(process: "subprocess.Popen[bytes]", hung: threading.Event) -> None:
    hung.set()
    process.kill()


def _findings_of(lines: IO[bytes]) -> Iterator[Finding]:
    """What libraries print besides is passed over."""
    with lines:
        for line in lines:
            if line.startswith(b"{"):
                yield msgspec.json.decode(line, type=Finding)


def _hung(timeout_s: float) -> Finding:
    advice = "If this was the first run, kernels were being compiled: try again, with nothing else running."
    return Finding(_NAME, "problem", f"It was not done within {timeout_s:.0f} s", advice)


def _died(code: int, said: IO[bytes]) -> Finding:
    said.seek(0)
    lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"signal {-code} ended it" if code < 0 else f"it ended with exit code {code}"
    last = f", saying: {lines[-1].strip()}" if lines else ""
    return Finding(_NAME, "problem", f"{how}{last}", "Please report this with what helix doctor --json tells.")
