"""Seeds for requests that bring none.

From the system, or, where the server itself has a seed, from that, so that a run can be had again.
"""

import random


def seed_source(seed: int | None) -> random.Random:
    """A generator whose ``getrandbits(64)`` gives seeds."""
    return random.SystemRandom() if seed is None else random.Random(seed)
