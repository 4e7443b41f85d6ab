"""Which device computes, how much memory it has left, and when it is full: nothing outside this room names a device.

Knows nothing about models.
"""

import errno
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import psutil
import torch

from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError

_CGROUP = Path("/sys/fs/cgroup")
_ZFS_CACHE = Path("/proc/spl/kstat/zfs/arcstats")


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


def obtainable_memory_bytes(device: torch.device) -> int:
    """What the device could give at most, whatever gives way for it: more than that is not to be had.

    It errs on the large side: what others use may go to swap, and where swap grows as it is wanted (elsewhere than on Linux),
    or a GPU borrows from the machine, all memory that there is counts.
    """
    memory = psutil.virtual_memory()
    if device.type == "cuda":
        return _obtainable_on_gpu(device, int(memory.total))
    if sys.platform != "linux":
        return int(memory.total)
    swap = int(psutil.swap_memory().free)
    most = min(int(memory.total), int(memory.available) + swap + _zfs_cache_bytes())
    left = _cgroup_left_bytes()
    return most if left is None else min(most, left + _cgroup_swap_left_bytes(swap))


def _obtainable_on_gpu(device: torch.device, machine_bytes: int) -> int:
    properties = torch.cuda.get_device_properties(device)
    if sys.platform == "win32" or getattr(properties, "is_integrated", False):
        return int(properties.total_memory) + machine_bytes
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory_bytes(device) + int(kept)


def _zfs_cache_bytes() -> int:
    """What ZFS keeps of files and would give back, which Linux does not count as available."""
    try:
        lines = [line.split() for line in _ZFS_CACHE.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(line[2]) for line in lines if line[:1] == ["size"]), 0)


def _cgroup_left_bytes() -> int | None:
    """What the cgroup (version 2) still grants, file pages and what else the kernel would drop included; None without a limit."""
    limit, used = (_cgroup_number(f"memory.{name}") for name in ("max", "current"))
    try:
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit is None or used is None:
        return None
    # Those that were read more than once count too, as they do in the whole machine's figure: a model's file at a second start.
    droppable = sum(int(statistics.get(name, 0)) for name in ("inactive_file", "active_file", "slab_reclaimable"))
    return max(0, limit - used + droppable)


def _cgroup_swap_left_bytes(swap_bytes: int) -> int:
    """Of the machine's free swap, what the cgroup still grants."""
    limit, used = _cgroup_number("memory.swap.max"), _cgroup_number("memory.swap.current")
    return swap_bytes if limit is None else min(swap_bytes, max(0, limit - (used or 0)))


def _cgroup_number(name: str) -> int | None:
    """None where there is no such file, or it sets no limit."""
    try:
        said = (_CGROUP / name).read_text().strip()
    except OSError:
        return None
    return None if said == "max" else int(said)


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
    except OSError as error:  # a file could not be mapped
        if error.errno != errno.ENOMEM:
            raise
        raise OutOfMemoryError(str(error)) from error
    except RuntimeError as error:
        said = str(error).lower()
        if not any(words in said for words in ("out of memory", "not enough memory", "can't allocate memory")):
            raise
        raise OutOfMemoryError(str(error)) from error
