"""A Chromium for the tests of the web pages: the one on the PATH, or one that is fetched.

Asks the system's package manager first where it may (Debian and the like, as root), then playwright, which keeps its
own copies in the user's cache folder.  Everything has a time limit, and what the tools said is in the set-up's log.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import environment

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_LIMIT_S = 60
FETCH_LIMIT_S = 240

# One that is there but lacks a library does not count: only one that starts does.
STARTS = """
import sys
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    playwright.chromium.launch(executable_path=sys.argv[1] or None, args=["--no-sandbox"]).close()
"""
APT = "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium"


def on_path() -> str | None:
    """The Chromium, or Chrome, that the PATH has."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def ensure(python: Path) -> str | None:
    """Make sure that the environment's playwright can start a Chromium; None, or why it cannot."""
    if starts(python):
        return None
    for name, command in ways(python):
        with environment.Activity(f"Fetching Chromium ({name})"):
            fetched = run_limited(command, FETCH_LIMIT_S)
        if fetched and starts(python):
            return None
        print(f"{name} gave none that starts", flush=True)
    return f"no Chromium starts on this machine and none could be fetched; {environment.LOG} has the reasons"


def ways(python: Path) -> Iterator[tuple[str, list[str]]]:
    """How one may be fetched here: a name and a command each."""
    if shutil.which("apt-get") is not None and os.geteuid() == 0:
        yield "apt-get", ["sh", "-c", APT]
    yield "playwright", [str(python), "-m", "playwright", "install", "--only-shell", "chromium"]


def starts(python: Path) -> bool:
    """Whether the one on the PATH starts, or else playwright's own."""
    return run_limited([str(python), "-c", STARTS, on_path() or ""], START_LIMIT_S)


def run_limited(command: list[str], limit_s: float) -> bool:
    """Run a command with its output in the log; whether it went well and in time."""
    with environment.LOG.open("a", encoding="utf-8") as log:
        print(f"$ {' '.join(command)}", file=log, flush=True)
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=limit_s, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            print(error, file=log)
            return False
    return done.returncode == 0
