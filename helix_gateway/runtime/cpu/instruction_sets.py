"""Which instructions compiled code may use: those of this processor, unless numba has been told to leave some out.

``NUMBA_CPU_FEATURES`` and ``NUMBA_CPU_NAME`` are numba's own variables for that; whoever asks here and not the processor
itself is held to them, so that code for a lesser machine can be tested on a better one.  Knows nothing about kernels.
"""

import platform
from functools import cache

from numba.core import config
from numba.core.codegen import get_host_cpu_features


@cache
def target_features() -> frozenset[str]:
    """LLVM's names of the instruction sets that numba compiles for, such as ``avx2`` or ``avx512vnni``."""
    told = config.CPU_FEATURES
    if told is None:
        told = "" if config.CPU_NAME == "generic" else get_host_cpu_features()
    return frozenset(name[1:] for name in told.split(",") if name.startswith("+"))


def is_x86() -> bool:
    """Whether the processor is of the x86 family."""
    return platform.machine().lower() in ("x86_64", "amd64")
