"""How much compiled code there is already, for whoever wants to show that more is being made.

Looks at the folder that this package's import has chosen; knows nothing about what is compiled.
"""

import os
from pathlib import Path

USUAL_FUNCTIONS = 91
"""That a first start of the default model leaves compiled; another model's are about as many."""


def num_compiled() -> int:
    """Functions that lie compiled in this version's folder; 0 where there is none yet."""
    folder = os.environ.get("NUMBA_CACHE_DIR")
    return sum(1 for _ in Path(folder).rglob("*.nbc")) if folder else 0


def is_first_start() -> bool:
    """Whether most is still to be compiled: at the first start of a version, or after one that was broken off."""
    return num_compiled() < USUAL_FUNCTIONS // 2
