"""``helix serve --reload``, for people who work on Helix: the server again, whenever a file of the package changes.

Knows nothing about what it starts.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

import helix_gateway
from helix_gateway.core.errors import HelixError

PACKAGE = Path(helix_gateway.__file__).parent


def serve_again_on_change(arguments: Sequence[str]) -> None:
    """Run ``helix`` with ``arguments`` (``["serve", …]``) until Ctrl-C, and again whenever the package changes.

    Raises:
        HelixError: what watches files is not installed.
    """
    os.environ.setdefault("HELIX_DRAIN_TIMEOUT", "0")  # whoever saves a file wants to see it, not to wait
    command = [sys.executable, "-m", "helix_gateway", *(word for word in arguments if word != "--reload")]
    run_again_on_change(PACKAGE, command)


def run_again_on_change(folder: Path, command: Sequence[str]) -> None:
    """Run a command until Ctrl-C, and again whenever a Python file below ``folder`` changes.

    Raises:
        HelixError: what watches files is not installed.
    """
    try:
        from watchfiles import PythonFilter, run_process
    except ImportError:
        raise HelixError("--reload needs the library watchfiles: pip install watchfiles") from None

    def tell(changes: set[tuple[Any, str]]) -> None:
        names = sorted(os.path.relpath(path, folder) for _, path in changes)
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        typer.echo(f"helix: {names[0]}{others} changed; starting again", err=True)

    run_process(folder, target=shlex.join(command), target_type="command", watch_filter=PythonFilter(), callback=tell)
