"""Settings of Python's own that decide how long the event loop waits for its turn.

Worker threads and the loop share one lock, and the garbage collector keeps it for a whole pass.  Process-wide, so
whoever serves asks for it, not whoever is imported.  Knows nothing about what runs.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCH_INTERVAL_S = 0.001
"""How long a worker thread keeps the lock while the loop waits for it; Python's own choice is 5 ms."""
_COLLECT_AFTER = (10_000, 20, 50)
"""Objects before a young pass, young passes before a middle one, middle ones before a full one.  A conversation of
16,384 messages is some 100,000 objects, none of them garbage while it is answered: Python's own choice (700, 10, 10)
goes over them again and again, and over all of transformers with them (measured: the loop stood still for 150 to 190
ms; with this 11 to 19)."""


@contextmanager
def quick_turns() -> Iterator[None]:
    """Let the loop have its turn soon, for as long as this is open.

    What exists already is taken to stay: the collector looks at it no more.
    """
    interval_s, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        sys.setswitchinterval(interval_s)
