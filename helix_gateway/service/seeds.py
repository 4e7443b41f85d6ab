"""Seeds for requests that bring none.

From the system, or, where the server itself has a seed, from that, so that a run can be had again.
"""

import random

SEED_BITS = 53
"""So that any client can send a seed back: JavaScript's numbers hold no more."""


def seed_source(seed: int | None) -> random.Random:
    """A generator whose ``getrandbits(SEED_BITS)`` gives seeds."""
    return random.SystemRandom() if seed is None else random.Random(seed)
