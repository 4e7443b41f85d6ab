"""How much compiled code there is already, for whoever wants to show that more is being made, or to make some ahead.

Looks at the folder that this package's import has chosen; knows nothing about what is compiled.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

USUAL_FUNCTIONS = 97
"""That a first start of the default model leaves compiled; another model's are about as many."""

_EVERY_ENGINES = "ahead"
_LONGEST_S = 600.0
_LOOK_EVERY_S = 0.1
"""At whether it is still worth waiting."""


def num_compiled() -> int:
    """Functions that lie compiled in this version's folder; 0 where there is none yet."""
    folder = _folder()
    return sum(1 for _ in folder.rglob("*.nbc")) if folder else 0


def is_first_start() -> bool:
    """Whether most is still to be compiled: at the first start of a version, or after one that was broken off.

    Elsewhere than on a CPU few functions are ever compiled; there it tells that all those compiled ahead are.
    """
    return not is_compiled(_EVERY_ENGINES) and num_compiled() < USUAL_FUNCTIONS // 2


def mark_compiled_ahead() -> None:
    """Note that all that any engine needs lies compiled: no start is a first one any more."""
    mark_compiled(_EVERY_ENGINES)


def is_compiled(what: str) -> bool:
    """Whether `mark_compiled` was called for it, in this version's folder."""
    folder = _folder()
    return bool(folder and (folder / f"compiled-{what}").exists())


def mark_compiled(what: str) -> None:
    """Note that all that something needs lies compiled."""
    folder = _folder()
    if folder:
        with suppress(OSError):  # what could not be kept either: the next start tries again
            (folder / f"compiled-{what}").touch()


@contextmanager
def compiling_alone(what: str, go_on: Callable[[], None]) -> Iterator[None]:
    """Wait for whoever compiles something already, in any process, and keep others waiting; not for ever.

    Args:
        go_on: called every now and then while this waits; what it raises ends that.
    """
    import filelock

    folder = _folder()
    with ExitStack() as held:
        # Where a file system has no locks it is as without this one.
        with suppress(OSError, NotImplementedError):
            if folder:
                lock = filelock.FileLock(folder / f".compiling-{what}")
                _acquire(lock, go_on)
                held.callback(lock.release)
        yield


def _acquire(lock: "BaseFileLock", go_on: Callable[[], None]) -> None:
    """Take the lock, or go without where somebody stands still with it."""
    for _ in range(round(_LONGEST_S / _LOOK_EVERY_S)):
        go_on()
        with suppress(TimeoutError):
            lock.acquire(timeout=_LOOK_EVERY_S)
            return


def _folder() -> Path | None:
    folder = os.environ.get("NUMBA_CACHE_DIR")
    return Path(folder) if folder else None
