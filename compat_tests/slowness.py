"""How slow the machine is that runs the tests, for limits of time that mean an ordinary one."""

import time
from functools import cache

_ORDINARY_S = 0.03
"""Processor time of `_piece` on a machine whose cores do some 3.5 thousand million turns a second."""


def _piece():
    counts = {}
    for number in range(300_000):
        counts[number & 1023] = counts.get(number & 1023, 0) + number
    return counts


def _seconds():
    began = time.process_time()
    _piece()
    return time.process_time() - began


@cache
def slowness():
    """1.0 for an ordinary machine or a faster one; 2.0 for one that takes twice as long for the same Python."""
    return max(1.0, min(_seconds() for _ in range(10)) / _ORDINARY_S)
