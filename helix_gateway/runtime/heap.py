"""How the C library keeps memory that was freed: given back at once while weights are moved about, kept while serving.

glibc raises the size from which it maps memory apart as large blocks are freed, up to 32 MB.  While a model is loaded
and packed, block after block, freed ones then stay behind in gaps that the next, a little larger, does not fit into, and
a load takes twice the weights.  Elsewhere than glibc nothing is done.  Knows nothing about models.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_MMAP_THRESHOLD = -3
_WHILE_LOADING = 256 * 1024
_WHILE_SERVING = 32 * 1024 * 1024
"""glibc's own most: activations of a step come and go without a system call."""


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Within, blocks of 256 KB and more go back to the system as they are freed; at the end, smaller ones too."""
    _call("mallopt", _M_MMAP_THRESHOLD, _WHILE_LOADING)
    try:
        yield
    finally:
        return_freed_blocks()
        _call("mallopt", _M_MMAP_THRESHOLD, _WHILE_SERVING)


def return_freed_blocks() -> None:
    """Give back what is free within the heaps of all threads.

    The threads in which transformers reads weights leave some tens of MB behind, whatever the size of the model.
    """
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    try:
        function: Any = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # not glibc; Windows takes no None
        return
    function(*arguments)
