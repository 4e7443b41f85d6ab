"""How fast this machine's processor reads memory: what bounds a single stream of tokens on a CPU.

Knows nothing about models.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 512 * 2**20
_PASSES = 5


def read_bandwidth_gb_per_s(threads: int, size_bytes: int = _BYTES) -> float:
    """The best of a few passes over memory that no cache holds, in 10⁹ bytes a second, all threads together.

    Each thread takes the inner product of its share with itself: one multiply-add a number, far less than a core can
    do while it waits for memory.
    """
    numbers = np.ones(size_bytes // 4, dtype=np.float32)
    shares = np.array_split(numbers, threads)
    best_s = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            start_s = time.perf_counter()
            list(pool.map(np.dot, shares, shares))
            best_s = min(best_s, time.perf_counter() - start_s)
    return numbers.nbytes / best_s / 1e9
