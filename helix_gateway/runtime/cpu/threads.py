"""How many threads compiled code uses, and what OpenMP must be told before it starts.

Imports neither torch nor numba until they are needed, so that whoever starts an engine process may ask for its
environment.  Knows nothing about what the threads do.
"""

import ctypes
import importlib.util
import math
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from helix_gateway.runtime.cache_folder import cache_folder

_OPENMP_OF_NUMBA = "libgomp.so.1.0.0"

_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1 = Path("/sys/fs/cgroup/cpu")
# How often an OpenMP thread looks for work before it sleeps (measured, SmolLM2's linear layers, two cores, ms a pass,
# at 1,000 / 4,000 / 16,000 / libgomp's own 300,000: alone 30 / 18 / 17 / 18, beside one busy process 74 / 46 / 46 / 56,
# beside seven 79 / 93 / - / 300: a thread that spins keeps the core from the one that it waits for).
_SPIN_COUNT = 4000


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, or its cgroup's quota where that is less; at least 1."""
    return max(1, math.ceil(min(_affinity(), _cgroup_quota())))


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def _cgroup_quota() -> float:
    """Cores' worth of time that the cgroup grants; infinite without a limit."""
    try:
        if _CGROUP_V2.exists():
            quota, period = _CGROUP_V2.read_text().split()
        else:
            quota, period = ((_CGROUP_V1 / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError):  # no cgroups here, or "max"
        return math.inf


def wanted_threads() -> int:
    """What the user asked for (``NUMBA_NUM_THREADS`` or ``OMP_NUM_THREADS``), else `usable_cores`."""
    asked = os.environ.get("NUMBA_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else usable_cores()


def engine_environment() -> dict[str, str]:
    """Environment variables for a process that will run compiled code, to be set before it starts.

    What the user has set already is not among them.  OpenMP reads them when it is loaded.  Threads are bound to cores,
    since the system wakes an unbound one on the core of the thread that waits for it (measured: 65 ms a pass in place
    of 23 where 20 ms of idleness lie between), except under a cgroup quota: there every container would be bound to
    the same first cores.  Binding narrows the affinity mask of the process's first thread, and of all that it starts
    later, so the number of cores is told, not found out.
    """
    cores = wanted_threads()
    environment = {"OMP_NUM_THREADS": str(cores), "NUMBA_NUM_THREADS": str(cores), "GOMP_SPINCOUNT": str(_SPIN_COUNT)}
    if cores == _affinity():
        environment["OMP_PROC_BIND"] = "true"
    environment = {name: value for name, value in environment.items() if name not in os.environ}
    if sys.platform == "linux" and not _loads(_OPENMP_OF_NUMBA):
        environment.update(_openmp_of_torch())
    return environment


def unbind_thread() -> None:
    """Let the calling thread, and what it starts, run on any core that the process was given.

    A thread inherits the core that its maker is bound to, and would share it with the engine's first.
    """
    with suppress(AttributeError, OSError):  # macOS, Windows; a core that was taken away meanwhile
        os.sched_setaffinity(0, _CORES_AT_IMPORT)


def _mask() -> frozenset[int]:
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:
        return frozenset()


_CORES_AT_IMPORT = _mask()
"""Before OpenMP binds anything: who loads it by `load_openmp` has imported this module first."""


def load_openmp() -> None:
    """Load the OpenMP library of compiled code before another library brings one of its own along.

    Each copy (torch's, sentencepiece's, the system's) binds the first thread to a core as it is loaded, and the next one
    takes the mask that is left for all there is: its threads then share one core, and a step takes twice as long.  To be
    called before anything that computes is imported.  Where there is no such library, nothing happens.
    """
    with suppress(OSError):
        ctypes.CDLL(_OPENMP_OF_NUMBA)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _openmp_of_torch() -> dict[str, str]:
    """Let numba find the OpenMP library that torch brings along; nothing where torch has none.

    Slim systems have no libgomp of their own, and numba's wheels ask for it by its full version.
    """
    torch = importlib.util.find_spec("torch")
    libraries = sorted((Path(torch.origin).parent / "lib").glob("libgomp*")) if torch and torch.origin else []
    if not libraries:
        return {}
    link = cache_folder() / "openmp" / _OPENMP_OF_NUMBA
    try:
        if link.resolve() != libraries[0].resolve():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(libraries[0])
    except OSError:  # numba's own work queue will do
        return {}
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(link.parent), os.environ.get("LD_LIBRARY_PATH")]))}


@cache
def configure_threads() -> int:
    """Give compiled code its threads and return how many; the first call does it, before the first parallel kernel.

    The number is that of `wanted_threads`, which an engine's process is told by its environment.  OpenMP is taken where
    it loads: numba's own work queue needs 110 microseconds for a parallel region.
    """
    import numba

    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    count: int = min(wanted_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(count)
    return count
