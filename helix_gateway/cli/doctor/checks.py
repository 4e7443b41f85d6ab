"""From what a machine has to findings: what is well, what is not, and what to do.

Each check is a function of what was looked up, so that a test can try it with a machine that it makes up.  Knows nothing
about how things are looked up or shown.
"""

import platform
from collections.abc import Mapping
from pathlib import Path

from helix_gateway.cli.doctor.packages import OLDEST, numbers_of
from helix_gateway.runtime.hardware import Gpu, Hardware
from helix_gateway.service.findings import Finding

_GB = 10**9
LEAST_MEMORY_BYTES = 2 * _GB
"""What the default model takes, even in float32, its cache included."""
LEAST_DISK_BYTES = _GB // 2
_TORCH_BUILDS = {"nvidia": "CUDA", "amd": "ROCm (on Windows: DirectML)"}


def check_python() -> Finding:
    """Which Python runs this; Helix could not have been installed into one too old."""
    said = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}"
    return Finding("python", "ok", said)


def check_processor(hardware: Hardware) -> Finding:
    """Cores and instruction sets."""
    cores = f"{hardware.usable_cores} cores"
    if hardware.usable_cores < hardware.cores:
        cores = f"{hardware.usable_cores} of {hardware.cores} cores may be used"
    said = f"{hardware.processor}, {cores}, {' '.join(hardware.instruction_sets) or 'no instruction sets told'}"
    if hardware.machine.lower() in {"x86_64", "amd64"} and "avx2" not in hardware.instruction_sets:
        advice = "Without AVX2 models compute several times slower here; in a virtual machine, let it see the host's processor."
        return Finding("processor", "warning", said, advice)
    # Windows tells nothing of an Arm processor, not even that it has NEON, which all have.
    if "neon" in hardware.instruction_sets and "asimddp" not in hardware.instruction_sets:
        advice = "Without Arm's dot products quantised weights take four times as many instructions here: try --quantization none too."
        return Finding("processor", "warning", said, advice)
    return Finding("processor", "ok", said)


def check_load(hardware: Hardware) -> Finding | None:
    """Whether others use the processor; None where the system does not tell."""
    if hardware.load is None:
        return None
    said = f"{hardware.load:.1f} processes wanted a core during the last minute"
    if hardware.load <= hardware.usable_cores / 2:
        return Finding("load", "ok", said)
    advice = "An engine wants all cores for itself: figures below will be worse than they could be."
    return Finding("load", "warning", said, advice)


def check_memory(hardware: Hardware) -> Finding:
    """Whether the default model fits."""
    if hardware.available_bytes is None or hardware.memory_bytes is None:
        return Finding("memory", "ok", "not told by the system")
    said = f"{_gb(hardware.available_bytes)} of {_gb(hardware.memory_bytes)} could be had"
    if hardware.available_bytes >= LEAST_MEMORY_BYTES:
        return Finding("memory", "ok", said)
    advice = "End other programs, or serve with a small --kv-cache-memory such as 256MiB."
    return Finding("memory", "warning", said, advice)


def check_gpus(hardware: Hardware, torch: str | None) -> list[Finding]:
    """Every GPU, and whether the torch that is installed can use it at all."""
    return [_check_gpu(gpu, torch) for gpu in hardware.gpus] or [
        Finding("gpu", "ok", "none; models run on the processor")
    ]


def _check_gpu(gpu: Gpu, torch: str | None) -> Finding:
    memory = "" if gpu.memory_bytes is None else f", {_gb(gpu.memory_bytes)}"
    driver = "" if gpu.driver is None else f", driver {gpu.driver}"
    said = f"{gpu.name}{memory}{driver}"
    build = _TORCH_BUILDS.get(gpu.vendor)
    if build is None or torch is None or not torch.endswith("+cpu"):
        return Finding("gpu", "ok", said)
    advice = f"The torch here ({torch}) is a CPU build and leaves it idle: install torch's {build} build."
    return Finding("gpu", "warning", said, advice)


def check_packages(installed: Mapping[str, str | None]) -> list[Finding]:
    """The libraries that matter, each with what is wrong about it, or all in one line."""
    wrong = [finding for name, version in installed.items() if (finding := _check_package(name, version)) is not None]
    there = ", ".join(f"{name} {version}" for name, version in installed.items() if version is not None)
    return wrong or [Finding("packages", "ok", there)]


def _check_package(name: str, version: str | None) -> Finding | None:
    if version is None:
        return Finding(name, "problem", "not installed", f"pip install {name}, or python3 scripts/quickstart.py.")
    oldest = OLDEST.get(name, ())
    if numbers_of(version) >= oldest:
        return None
    wanted = ".".join(map(str, oldest))
    return Finding(name, "problem", f"{version} is too old", f"pip install '{name}>={wanted}'.")


def check_cache(folder: Path, writable: bool, free_bytes: int | None) -> Finding:
    """Whether models and compiled kernels can be kept."""
    if not writable:
        advice = "Set HELIX_CACHE to a folder that can be written; until then kernels are compiled at every start."
        return Finding("cache", "problem", f"{folder} cannot be written", advice)
    if free_bytes is not None and free_bytes < LEAST_DISK_BYTES:
        advice = "Make room, or set HELIX_CACHE to a folder on another disk."
        return Finding("cache", "warning", f"{folder} has {_gb(free_bytes)} free", advice)
    room = "" if free_bytes is None else f", {_gb(free_bytes)} free"
    return Finding("cache", "ok", f"{folder}{room}")


def check_default_model(path: Path, there: bool) -> Finding:
    """Whether the first start would have to download."""
    if there:
        return Finding("default model", "ok", str(path))
    advice = "helix models pull fetches it (98 MB); the first start does so too."
    return Finding("default model", "warning", "not downloaded yet", advice)


def check_port(port: int, error: str | None) -> Finding:
    """Whether a server could listen where it would by default."""
    if error is None:
        return Finding("port", "ok", f"{port} is free")
    advice = "If that is not a Helix of yours, serve with another: helix serve --port 0 picks a free one."
    return Finding("port", "warning", f"{port} cannot be listened on: {error}", advice)


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / _GB:.1f} GB"
