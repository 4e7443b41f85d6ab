"""Compiled code for CPUs: products, attention and their scalar mathematics, in Python that numba compiles.

Importing this package decides where compiled code is kept between runs (`compile_cache`) and, on Arm, what it is compiled
for (`arm`); it must come before numba sees the first function to cache.
"""

from helix_gateway.runtime.cpu.arm import tell_numba
from helix_gateway.runtime.cpu.compile_cache import use_compile_cache

# Before the folder is chosen, which depends on it: a process that this one starts must choose the same.
tell_numba()
COMPILED_NOT_KEPT: str | None = use_compile_cache()
"""Why compiled code is not kept between runs: the folder, and what the system says of it; None where it is."""
