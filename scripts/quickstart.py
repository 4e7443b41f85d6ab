"""From a bare machine to a running server: ``python3 scripts/quickstart.py [arguments of helix serve]``.

Makes ``.venv`` with Helix and the right torch for this machine, gets the model, serves it.  Run again, it serves
at once.  Knows nothing about how any of that is done: `environment` sets up, ``helix serve`` does the rest.
"""

import os
import subprocess
import sys

import environment


def main() -> int:
    """Set up, then become ``helix serve``."""
    python = environment.ensure()
    command = [str(python), "-m", "helix_gateway", "serve", *sys.argv[1:]]
    sys.stdout.flush()
    if os.name == "nt":  # exec on Windows leaves the terminal to the shell
        return subprocess.call(command)
    return os.execv(command[0], command)  # noqa: S606 - the environment's own interpreter


if __name__ == "__main__":
    environment.run_script(main)
