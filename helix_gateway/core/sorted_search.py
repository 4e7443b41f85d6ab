"""Where a value stands among sorted ones, for compiled code: numba's own `np.searchsorted` takes seconds to compile.

Knows nothing about what the values are.
"""

import numba

from helix_gateway.core.inner_functions import INNER


@numba.njit(cache=True, **INNER)
def first_from(values, value, first, behind):  # type: ignore[no-untyped-def]
    """The first place from ``first`` on whose value is not below ``value``; ``behind`` if there is none before it."""
    while first < behind:
        middle = (first + behind) // 2
        if values[middle] < value:
            first = middle + 1
        else:
            behind = middle
    return first
