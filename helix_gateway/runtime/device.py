"""Which device computes, how much memory it has left, and when it is full: nothing outside this room names a device.

Knows nothing about models.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import psutil
import torch

from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError

_CGROUP = Path("/sys/fs/cgroup")


def get_device(name: str = "auto") -> torch.device:
    """The device of that name, or for ``"auto"`` the best there is: cuda (rocm too), directml, mps, xpu, cpu.

    Raises:
        ModelLoadError: the device that was asked for is not there.
    """
    if name != "auto":
        return _named(name)
    for candidate in ("cuda", "directml", "mps", "xpu"):
        if _is_there(candidate):
            return _named(candidate)
    return torch.device("cpu")


def _is_there(name: str) -> bool:
    if name == "cuda":
        return torch.cuda.is_available()
    if name == "directml":
        directml = _directml()
        return directml is not None and bool(directml.is_available())
    if name == "mps":
        return torch.backends.mps.is_available()
    return name == "cpu" or (hasattr(torch, "xpu") and torch.xpu.is_available())


def _named(name: str) -> torch.device:
    if not _is_there(name):
        raise ModelLoadError(f"This machine has no {name} device that torch can use; try --device auto.")
    directml = _directml() if name == "directml" else None
    device: torch.device = torch.device(name) if directml is None else directml.device()
    return device


def _directml() -> ModuleType | None:
    try:
        return importlib.import_module("torch_directml")
    except ImportError:
        return None


def free_memory_bytes(device: torch.device) -> int:
    """Memory that the device could still give, as far as it tells; on a CPU bounded by the cgroup's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    available = int(psutil.virtual_memory().available)
    left = _cgroup_left_bytes()
    return available if left is None else min(available, left)


def _cgroup_left_bytes() -> int | None:
    """What the cgroup (version 2) still grants, file pages that it could drop included; None without a limit."""
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(used) + int(statistics.get("inactive_file", 0)))


@contextmanager
def memory_errors_named() -> Iterator[None]:
    """The ways of torch to say that a device is full, as the one error that the engine knows.

    Raises:
        OutOfMemoryError: what runs within found no room.
    """
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(str(error)) from error
    except RuntimeError as error:
        said = str(error).lower()
        if not any(words in said for words in ("out of memory", "not enough memory", "can't allocate memory")):
            raise
        raise OutOfMemoryError(str(error)) from error
