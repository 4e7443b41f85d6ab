"""Everything that must hold before a change lands: ``python3 scripts/check.py [--deep]``.

Sets up ``.venv`` with the development extras, then runs the linters, the types, the layers and the tests, each
under its own heading; goes on after one that failed, and exits with 1 if any did.  The web pages are looked at in a
Chromium, which is fetched where there is none; where none can be had, that part is left out, and the end says so.  ``--deep`` runs the same tests
at a higher setting (more examples, more architectures, longer soaks).  Knows nothing about what the tools check:
that is in ``pyproject.toml`` and ``setup.cfg``.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import chromium
import environment

BROWSER_TESTS = "compat_tests/browser"


def checks(python: Path) -> dict[str, list[str]]:
    """The commands, in the order in which they fail fastest."""
    module = [str(python), "-m"]
    # Types as the oldest Python sees them; from 3.12 on, numpy's own need newer syntax than that.
    oldest = ["--python-version", "3.10"] if sys.version_info < (3, 12) else []
    return {
        "ruff": [*module, "ruff", "check", "."],
        "black": [*module, "black", "--check", "."],
        "import-linter": [str(python.with_name("lint-imports")), "--no-cache", "--no-logo", "pyproject.toml"],
        "mypy": [*module, "mypy", "--strict", *oldest],
        "pytest": [*module, "pytest", "--durations=15", f"--ignore={BROWSER_TESTS}"],
    }


def browser_check(python: Path) -> dict[str, list[str]]:
    """The command that looks at the web pages in a Chromium; none where there is no Chromium, which is said aloud."""
    missing = chromium.ensure(python)
    if missing is None:
        return {"browser": [str(python), "-m", "pytest", "--durations=5", BROWSER_TESTS]}
    print(f"\n=== browser: SKIPPED: {missing}", flush=True)
    return {}


def run(name: str, command: list[str], variables: dict[str, str]) -> tuple[bool, float]:
    """Run one check under its heading; whether it passed, and its seconds."""
    print(f"\n=== {name}", flush=True)
    start = time.monotonic()
    code = subprocess.call(command, cwd=environment.ROOT, env={**os.environ, **variables}, stdin=subprocess.DEVNULL)
    elapsed_s = time.monotonic() - start
    print(f"=== {name}: {'passed' if code == 0 else f'FAILED (exit code {code})'} in {elapsed_s:.1f} s", flush=True)
    return code == 0, elapsed_s


def main() -> int:
    """Set up and run all checks; 0 if all passed."""
    parser = argparse.ArgumentParser(description="Set up the development environment and run every check.")
    parser.add_argument("--deep", action="store_true", help="the same tests at a higher setting: takes hours")
    variables = {"HELIX_TEST_DEEP": "1"} if parser.parse_args().deep else {}
    python = environment.ensure(["dev"])
    results = {name: run(name, command, variables) for name, command in checks(python).items()}
    pages = {name: run(name, command, variables) for name, command in browser_check(python).items()}
    results.update(pages)
    print("\n" + "\n".join(f"{'ok' if ok else 'FAILED':7} {s:8.1f} s  {name}" for name, (ok, s) in results.items()))
    if not pages:
        print(f"SKIPPED             browser: the web pages were NOT tested ({BROWSER_TESTS}), for want of a Chromium")
    return 0 if all(ok for ok, _ in results.values()) else 1


if __name__ == "__main__":
    environment.run_script(main)
