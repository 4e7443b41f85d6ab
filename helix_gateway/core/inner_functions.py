"""How functions are compiled that compiled code alone calls.

numba gives every function two ways in from outside, one for Python and one for C, which take and return every field of
its arguments.  They were a quarter of what a first start compiles (docs/log.md).  Without them there is nothing to call:
Python that does so ends with its process, so `compat_tests/test_inner_functions.py` looks for such calls.  Knows nothing
about what functions do; it is here since engine and runtime both have such functions.
"""

INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""For ``njit``, beside whatever else it is told; numba's own, and what it compiles its overloads with."""
