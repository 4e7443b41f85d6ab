"""Where numba keeps compiled code between runs: Helix's cache folder, one subfolder for each state of the sources and processor.

numba by itself writes beside the sources, which may be read-only, and knows a cached function by its own file alone: code
inlined from another file, or a constant of one, would go stale unseen.  Here the folder's name is a digest of every source
that compiled code is made of, so a change to any of them compiles all anew; and processes that write there at once do so in
turn.  Code for another processor numba tells apart by itself, but not we how much of it there is: where machines share a
folder, each kind has its own in it.  Knows nothing about what is compiled.
"""

import atexit
import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

from helix_gateway.runtime.cache_folder import cache_folder

_VARIABLE = "NUMBA_CACHE_DIR"
_CPU_VARIABLES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")
_CPUINFO = Path("/proc/cpuinfo")
_TELLING_FIELDS = frozenset(
    (
        "vendor_id",
        "cpu family",
        "model",
        "model name",
        "flags",
        "CPU implementer",
        "CPU variant",
        "CPU part",
        "Features",
    )
)
"""Of a processor in Linux' list: what compilers tell them apart by."""
_KEPT_FOLDERS = 16
_FOLDER_NAME = re.compile(r"helix-[0-9a-f]{16}")
_WHOLE_FOLDER = "runtime/cpu/"
_CONSTANTS = ("core/inner_functions.py", "runtime/kv_format.py")
_LOCK_WAIT_S = 2.0


def use_compile_cache() -> str | None:
    """Point numba at this version's folder: in Helix's cache folder, or in what the user has named (``NUMBA_CACHE_DIR``).

    Where that cannot be written, a temporary one serves this process, and those that it starts: they compile anew.

    Returns:
        Why nothing is kept, the folder's path in it; None where it is.
    """
    folder = _home() / f"helix-{_digest(compiled_sources(Path(__file__).parent.parent.parent))}"
    reason = _why_not_writable(folder)
    if reason is None:
        _forget_others(folder)
    os.environ[_VARIABLE] = str(folder if reason is None else _temporary(folder.name))
    if "numba" in sys.modules:
        sys.modules["numba"].config.reload_config()
    return reason


def compiled_sources(package: Path) -> dict[str, bytes]:
    """What compiled code is made of, by its path in the package: functions, what emits code, the constants of both."""
    start = len(package.as_posix()) + 1
    sources = {path.as_posix()[start:]: path.read_bytes() for path in sorted(package.rglob("*.py"))}
    return {
        place: source
        for place, source in sources.items()
        if b"numba" in source or place.startswith(_WHOLE_FOLDER) or place in _CONSTANTS
    }


@cache
def write_in_turn() -> None:
    """Let numba, in this process, add to what lies in the folder only while it holds the folder's lock.

    By itself it reads a function's index, adds an entry and writes it back: of two processes that compile one function for
    different types at the same time, both may put their code into one file, and one type then finds the other's.
    To be called before anything is compiled.
    """
    import filelock
    from numba import config
    from numba.core.caching import IndexDataCacheFile

    save, lock = IndexDataCacheFile.save, filelock.FileLock(Path(config.CACHE_DIR) / ".lock")

    def save_alone(index: Any, key: Any, data: Any) -> None:
        with ExitStack() as held:
            # Where a file system has no locks, or somebody stands still with this one, it is as without it.
            with suppress(OSError, NotImplementedError):
                held.enter_context(lock.acquire(timeout=_LOCK_WAIT_S))
            save(index, key, data)

    IndexDataCacheFile.save = save_alone


def _home() -> Path:
    """What the folders of all versions lie in."""
    named = os.environ.get(_VARIABLE)
    if not named:
        return cache_folder() / "compiled"
    # A process that started this one, perhaps of another version, has named its own.
    return Path(named).parent if _FOLDER_NAME.fullmatch(Path(named).name) else Path(named)


def _why_not_writable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions do not tell of a system that is read-only, nor hold for whoever may do anything.
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder.parent}: {error.strerror or error}"


def _temporary(name: str) -> Path:
    """A folder that is deleted at the end of this process, which ends last of all that use it."""
    maker, made = os.getpid(), Path(tempfile.mkdtemp(prefix="helix-compiled-"))

    def delete() -> None:
        if os.getpid() == maker:  # and none that was forked from it
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(delete)
    folder = made / name
    folder.mkdir()
    return folder


def _digest(sources: dict[str, bytes]) -> str:
    """A name for the state of sources, and for the processor that they are compiled for."""
    digest = hashlib.sha256(repr(_processor()).encode())
    for place, source in sources.items():
        digest.update(place.encode() + b"\0" + source + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> list[str]:
    """What tells one kind of processor from another, at once: neither numba nor LLVM is imported yet."""
    told = [os.environ.get(name, "") for name in _CPU_VARIABLES]
    return [platform.system(), platform.machine(), *told, *(_listed() or [platform.processor()])]


def _listed() -> list[str]:
    """The first processor of Linux' list; on machines with hundreds the whole takes long to read."""
    lines = []
    with suppress(OSError), _CPUINFO.open(errors="replace") as file:
        for line in file:
            if not line.strip():
                break
            if line.partition(":")[0].strip() in _TELLING_FIELDS:
                lines.append(line.strip())
    return lines


def _forget_others(current: Path) -> None:
    """Delete all but the most recent folders of Helix; the current one becomes the most recent."""
    # Another process may be doing the same: what has gone meanwhile is no trouble.
    with suppress(OSError):
        os.utime(current)
        folders = [path for path in current.parent.iterdir() if _FOLDER_NAME.fullmatch(path.name)]
        by_age = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
        for path in by_age[_KEPT_FOLDERS:]:
            shutil.rmtree(path, ignore_errors=True)
