"""Everything that must hold before a change lands: ``python3 scripts/check.py [--deep]``.

Sets up ``.venv`` with the development extras, then runs the linters, the types, the layers and the tests, each
under its own heading; goes on after one that failed, and exits with 1 if any did.  Kernels are compiled beside the
linters, which use one core.  Tests run two files at a time, but for those marked ``alone``, which come after.  The web
pages are looked at in a Chromium, which is fetched where there is none; where none can be had, that part is left out,
and the end says so.  ``--deep`` runs the same tests at a higher setting (more examples, more architectures, longer
soaks).  Knows nothing about what the tools check: that is in ``pyproject.toml`` and ``setup.cfg``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import chromium
import environment

BROWSER_TESTS = "compat_tests/browser"
WORKERS = 2
"""Processes that run tests side by side: each holds torch and a model or two, some 2 GB."""


def linters(python: Path) -> dict[str, list[str]]:
    """The commands that run no test, in the order in which they fail fastest."""
    module = [str(python), "-m"]
    # Types as the oldest Python sees them; from 3.12 on, numpy's own need newer syntax than that.
    oldest = ["--python-version", "3.10"] if sys.version_info < (3, 12) else []
    return {
        "ruff": [*module, "ruff", "check", "."],
        "black": [*module, "black", "--check", "."],
        "import-linter": [str(python.with_name("lint-imports")), "--no-cache", "--no-logo", "pyproject.toml"],
        "mypy": [*module, "mypy", "--strict", *oldest],
    }


def compiling(python: Path) -> list[str]:
    """The command that leaves the kernels of the default model compiled in the cache: to load it and answer."""
    return [str(python), "scripts/model_load_check.py", "--max-tokens", "3"]


def tests(python: Path) -> dict[str, list[str]]:
    """The commands that run the tests, the web pages' aside."""
    pytest = [str(python), "-m", "pytest", "--durations=15", f"--ignore={BROWSER_TESTS}"]
    # Files, not tests: what a file sets up for all its tests is set up once.
    beside = ["-n", str(WORKERS), "--dist", "loadfile"] if (os.cpu_count() or 1) >= WORKERS else []
    return {"tests": [*pytest, *beside, "-m", "not alone"], "tests, alone": [*pytest, "-m", "alone"]}


def browser_check(python: Path) -> dict[str, list[str]]:
    """The command that looks at the web pages in a Chromium; none where there is no Chromium, which is said aloud."""
    missing = chromium.ensure(python)
    if missing is None:
        return {"browser": [str(python), "-m", "pytest", "--durations=5", BROWSER_TESTS]}
    print(f"\n=== browser: SKIPPED: {missing}", flush=True)
    return {}


Result = tuple[bool, float]
"""Whether a check passed, and its seconds."""


def run(name: str, command: list[str], variables: dict[str, str]) -> Result:
    """Run one check under its heading."""
    print(f"\n=== {name}", flush=True)
    start = time.monotonic()
    code = subprocess.call(command, cwd=environment.ROOT, env={**os.environ, **variables}, stdin=subprocess.DEVNULL)
    return told(name, code, time.monotonic() - start)


def told(name: str, code: int, elapsed_s: float) -> Result:
    """Say what came of a check."""
    print(f"=== {name}: {'passed' if code == 0 else f'FAILED (exit code {code})'} in {elapsed_s:.1f} s", flush=True)
    return code == 0, elapsed_s


@dataclass
class Meanwhile:
    """A check that runs beside others; what it prints is shown under its own heading once it is waited for."""

    name: str
    command: list[str]
    variables: dict[str, str]
    _output: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def __post_init__(self) -> None:
        self._start_s = time.monotonic()
        self._process = subprocess.Popen(
            self.command,
            cwd=environment.ROOT,
            env={**os.environ, **self.variables},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> "Meanwhile":
        return self

    def __exit__(self, *error: object) -> None:
        """End it if nobody waited for its end."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self._output.close()

    def result(self) -> Result:
        """Wait for its end."""
        print(f"\n=== {self.name}", flush=True)
        code = self._process.wait()
        self._output.seek(0)
        print(self._output.read().decode(errors="replace"), end="", flush=True)
        return told(self.name, code, time.monotonic() - self._start_s)


def main() -> int:
    """Set up and run all checks; 0 if all passed."""
    parser = argparse.ArgumentParser(description="Set up the development environment and run every check.")
    parser.add_argument("--deep", action="store_true", help="the same tests at a higher setting: takes hours")
    variables = {"HELIX_TEST_DEEP": "1"} if parser.parse_args().deep else {}
    python = environment.ensure(["dev"])
    with Meanwhile("kernels", compiling(python), variables) as kernels:
        results = {name: run(name, command, variables) for name, command in linters(python).items()}
        results["kernels"] = kernels.result()
    results.update({name: run(name, command, variables) for name, command in tests(python).items()})
    pages = {name: run(name, command, variables) for name, command in browser_check(python).items()}
    results.update(pages)
    print("\n" + "\n".join(f"{'ok' if ok else 'FAILED':7} {s:8.1f} s  {name}" for name, (ok, s) in results.items()))
    if not pages:
        print(f"SKIPPED             browser: the web pages were NOT tested ({BROWSER_TESTS}), for want of a Chromium")
    return 0 if all(ok for ok, _ in results.values()) else 1


if __name__ == "__main__":
    environment.run_script(main)
