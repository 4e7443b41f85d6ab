"""Memory for weights that every step reads from one end to the other: one stretch, in large pages where there are any.

A page of 4 KB ends what a processor fetches ahead by itself, and costs a look-up of its address.  Elsewhere than on Linux,
or where the system gives no large pages, it is memory as any other.  Knows nothing about what is put there.
"""

import mmap
from contextlib import suppress

import torch

_LARGE_PAGE = 2 << 20
_LINE_BYTES = 64


class WeightMemory:
    """A stretch that is handed out from its beginning on; memory is taken from the system as it is written."""

    def __init__(self, num_bytes: int) -> None:
        """Room for ``num_bytes``, each piece rounded up to whole cache lines."""
        self._rest = _large_pages(num_bytes)

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a contiguous uint8 tensor, in the stretch.

        Raises:
            ValueError: there is not so much left.
        """
        size, room = tensor.numel(), room_for(tensor)
        if room > len(self._rest):
            raise ValueError(f"{room} bytes were asked for where {len(self._rest)} are left")
        piece, self._rest = self._rest[:size], self._rest[room:]
        return piece.view(tensor.shape).copy_(tensor)


def room_for(tensor: torch.Tensor) -> int:
    """Bytes that a uint8 tensor takes up in a `WeightMemory`."""
    return -(-tensor.numel() // _LINE_BYTES) * _LINE_BYTES


def _large_pages(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes], at the beginning of a large page if there are such."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, num_bytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # too little memory is told of as everywhere else
        return torch.empty(num_bytes, dtype=torch.uint8)
    with suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    stretch = torch.frombuffer(memory, dtype=torch.uint8)
    skipped = -stretch.data_ptr() % _LARGE_PAGE
    return stretch[skipped : skipped + num_bytes]
