"""Tells numba what an Arm processor can do, where LLVM does not find out by itself.

LLVM knows dot products and i8mm only of processors whose name it knows, and in a virtual machine that hides it, on macOS or
on a processor newer than LLVM it knows nothing.  The system tells on each.  Knows nothing about kernels, and does not
import numba, which reads what is left here when it is imported.
"""

import os
import platform
import sys
from collections.abc import Iterable

from helix_gateway.runtime.hardware import instruction_sets

_VARIABLE, _NAME_VARIABLE = "NUMBA_CPU_FEATURES", "NUMBA_CPU_NAME"
_LLVM_NAMES = {"neon": "neon", "asimddp": "dotprod", "i8mm": "i8mm"}
"""By Linux' names, what kernels ask for."""


def is_arm() -> bool:
    """Whether the processor is a 64-bit Arm."""
    return platform.machine().lower() in ("aarch64", "arm64")


def tell_numba() -> None:
    """Let numba compile for what the system tells of an Arm processor, unless the user has said for what."""
    if not is_arm() or _VARIABLE in os.environ or os.environ.get(_NAME_VARIABLE) == "generic":
        return
    os.environ[_VARIABLE] = complete(_known_to_llvm(), instruction_sets())
    if "numba" in sys.modules:
        sys.modules["numba"].config.reload_config()


def complete(features: str, told: Iterable[str]) -> str:
    """LLVM's list of features and what it lacks of those that the system told, by Linux' names."""
    found = [f"+{_LLVM_NAMES[name]}" for name in told if name in _LLVM_NAMES]
    kept = [feature for feature in features.split(",") if feature and f"+{feature[1:]}" not in found]
    return ",".join([*kept, *found])


def _known_to_llvm() -> str:
    from llvmlite import binding

    try:
        features: str = binding.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM has no way to ask this system
        return ""
    return features
