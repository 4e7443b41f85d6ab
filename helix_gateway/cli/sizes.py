"""Sizes of memory as people write them, to bytes.  Knows nothing about what is measured."""

import re
from decimal import Decimal

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
# As other servers' flags read them: a bare letter is binary.
_UNITS |= {letter: _UNITS[f"{letter}ib"] for letter in "kmgt"}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def parse_size(text: str) -> int:
    """Return the bytes that ``2GiB``, ``512MB``, ``1.5g`` or ``1048576`` mean.

    Raises:
        ValueError: it is no size, or none above zero; the message says how sizes are written.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 2GiB, 512MB or 1073741824 (bytes).")
    size_bytes = int(Decimal(match[1]) * _UNITS[match[2]])
    if size_bytes < 1:
        raise ValueError(f"{text!r} is no memory at all; write a size above zero, like 2GiB.")
    return size_bytes


def size_text(size_bytes: int) -> str:
    """The shortest way to write a size that `parse_size` reads: ``32MiB``, or plain bytes where no unit divides it."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _UNITS[unit.lower()] == 0:
            return f"{size_bytes // _UNITS[unit.lower()]}{unit}"
    return str(size_bytes)
