"""What this machine has for serving models: ``python3 scripts/hardware_check.py [--json]``.

Tells what ``helix doctor`` knows of the hardware, with the standard library alone, so that it can be asked before
anything is installed; versions are those of the Python that runs it.  Tries nothing: ``helix doctor`` does.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helix_gateway.cli.doctor.packages import installed
from helix_gateway.runtime.hardware import Hardware, inspect_hardware


def lines(hardware: Hardware) -> list[str]:
    """One line a thing, for a person."""
    gpus = [f"{gpu.name}, {size(gpu.memory_bytes)}" for gpu in hardware.gpus] or ["none that their tools tell of"]
    return [
        f"system           {hardware.system}, {hardware.machine}, Python {sys.version.split()[0]}",
        f"processor        {hardware.processor}",
        f"cores            {hardware.usable_cores} of {hardware.cores} may be used",
        f"instruction sets {' '.join(hardware.instruction_sets) or 'not told'}",
        f"memory           {size(hardware.memory_bytes)}, of which {size(hardware.available_bytes)} could be had",
        *(f"gpu              {gpu}" for gpu in gpus),
        *(f"{name:16} {version or 'not installed'}" for name, version in installed().items()),
    ]


def size(size_bytes: int | None) -> str:
    """Gigabytes, where the number is known."""
    return "not told" if size_bytes is None else f"{size_bytes / 1e9:.1f} GB"


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description="What this machine has for serving models.")
    parser.add_argument("--json", action="store_true", help="for programs")
    as_json = parser.parse_args().json
    hardware = inspect_hardware()
    if as_json:
        print(json.dumps({**asdict(hardware), "packages": installed()}, indent=1))
    else:
        print("\n".join(lines(hardware)))


if __name__ == "__main__":
    main()
