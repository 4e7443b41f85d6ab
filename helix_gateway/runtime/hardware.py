"""What the machine is made of: processor, memory, GPUs, disk.  Asked of the system and its tools alone.

Standard library only, and nothing is measured, so that it can be asked before anything is installed.  Knows nothing
about what any of it is good for.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION_SETS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8",
    "amx_bf16", "neon", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Those that decide how fast models compute, by Linux' names."""
_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_AMD_VENDOR = "0x1002"
_TOOL_TIMEOUT_S = 10.0
# What sysctl says on macOS.
_APPLE_WORDS = {
    "avx2": "avx2", "fma": "fma", "avx512f": "avx512f", "neon": "neon", "feat_dotprod: 1": "asimddp",
    "feat_i8mm: 1": "i8mm",
}  # fmt: skip
# Of Windows' IsProcessorFeaturePresent.
_WINDOWS_FEATURES = {"sse4_2": 38, "avx": 39, "avx2": 40, "avx512f": 41}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One graphics card, as its driver's tools tell of it."""

    vendor: str
    """"nvidia", "amd" or "apple"."""
    name: str
    memory_bytes: int | None
    driver: str | None


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine; None where it does not tell."""

    system: str
    machine: str
    """"x86_64", "arm64", …"""
    processor: str
    cores: int
    """All of the machine."""
    usable_cores: int
    """Those that this process may use: fewer in a container, or under an affinity mask."""
    instruction_sets: tuple[str, ...]
    memory_bytes: int | None
    available_bytes: int | None
    """Of the memory, what programs could still get."""
    gpus: tuple[Gpu, ...]
    load: float | None
    """Processes that wanted a core during the last minute, on average."""


def inspect_hardware() -> Hardware:
    """Look at the machine that this runs on."""
    total, available = _memory()
    return Hardware(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        usable_cores=_usable_cores(),
        instruction_sets=instruction_sets(),
        memory_bytes=total,
        available_bytes=available,
        gpus=(*_nvidia(), *_amd(), *_apple()),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def _usable_cores() -> int:
    try:
        from helix_gateway.runtime.cpu.threads import usable_cores
    except ImportError:  # a bare machine, on which Helix is not installed yet: containers' quotas are not seen
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return usable_cores()


def _processor() -> str:
    if sys.platform == "darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.processor()
    names = _fields(_CPUINFO, "model name") or _fields(_CPUINFO, "Model")
    return names[0] if names else platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Those of `INSTRUCTION_SETS` that the system says this processor has."""
    if sys.platform == "win32":
        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        found = {name for name, number in _WINDOWS_FEATURES.items() if present(number)}
    elif sys.platform == "darwin":
        found = _of_apple()
    else:
        flags = _fields(_CPUINFO, "flags") or _fields(_CPUINFO, "Features")
        found = set(" ".join(flags[:1]).split())
        found |= {"neon"} if "asimd" in found else set()
    return tuple(name for name in INSTRUCTION_SETS if name in found)


def _of_apple() -> set[str]:
    told = _output_of("sysctl", "-a", "machdep.cpu", "hw.optional").lower()
    return {name for word, name in _APPLE_WORDS.items() if word in told}


def _memory() -> tuple[int | None, int | None]:
    """All memory and what is available, in bytes."""
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(_MEMINFO), re.MULTILINE))
    if "MemTotal" in lines and "MemAvailable" in lines:
        return int(lines["MemTotal"]) * 1024, int(lines["MemAvailable"]) * 1024
    try:
        import psutil
    except ImportError:
        return None, None
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _nvidia() -> list[Gpu]:
    query = "--query-gpu=name,memory.total,driver_version"
    rows = _output_of("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()
    found = [[cell.strip() for cell in row.split(",")] for row in rows]
    return [
        Gpu("nvidia", name, int(mebibytes) * 2**20 if mebibytes.isdecimal() else None, driver)
        for name, mebibytes, driver in (row for row in found if len(row) == 3)
    ]


def _amd() -> list[Gpu]:
    if sys.platform == "win32":
        command = "(Get-CimInstance Win32_VideoController).Name"
        names = _output_of("powershell", "-NoProfile", "-Command", command).splitlines()
        return [Gpu("amd", name.strip(), None, None) for name in names if re.search(r"\b(AMD|Radeon)\b", name)]
    cards = sorted(Path("/sys/class/drm").glob("card[0-9]*/device/vendor"))
    return [_amd_card(vendor.parent) for vendor in cards if _read(vendor).strip() == _AMD_VENDOR]


def _amd_card(folder: Path) -> Gpu:
    name, memory = _read(folder / "product_name").strip(), _read(folder / "mem_info_vram_total").strip()
    return Gpu("amd", name or "AMD GPU", int(memory) if memory.isdecimal() else None, None)


def _apple() -> list[Gpu]:
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return [Gpu("apple", f"GPU of the {_processor()}", None, None)]
    return []


def _fields(path: Path, name: str) -> list[str]:
    """What follows ``name :`` in a file of such lines."""
    return re.findall(rf"^{re.escape(name)}\s*:\s*(.*)$", _read(path), re.MULTILINE)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _output_of(*command: str) -> str:
    """A tool's output; nothing where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
