"""Where numba keeps compiled code between runs: Helix's cache folder, one subfolder for each state of the sources.

numba by itself writes beside the sources, which may be read-only, and knows a cached function by the time stamp of its
own file alone: code inlined from another file would go stale unseen.  Here the folder's name is a digest of every
source with compiled code, so a change to any of them compiles all anew.  Knows nothing about what is compiled.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from helix_gateway.runtime.cache_folder import cache_folder

_VARIABLE = "NUMBA_CACHE_DIR"
_KEPT_FOLDERS = 8


def use_compile_cache() -> None:
    """Point numba at this version's folder, unless the user has named one (``NUMBA_CACHE_DIR``).

    Where the user's cache folder cannot be written, a temporary one serves this process: it compiles at each start.
    """
    if os.environ.get(_VARIABLE):
        return
    folder = cache_folder() / "compiled" / _sources_digest(Path(__file__).parent.parent.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if writable:
        _forget_others(folder)
    os.environ[_VARIABLE] = str(folder) if writable else tempfile.mkdtemp(prefix="helix-compiled-")
    if "numba" in sys.modules:
        sys.modules["numba"].config.reload_config()


def _sources_digest(folder: Path) -> str:
    """A name for the state of all sources under a folder that have something to do with numba."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        source = path.read_bytes()
        if b"numba" in source:
            digest.update(path.name.encode() + b"\0" + source)
    return digest.hexdigest()[:16]


def _forget_others(current: Path) -> None:
    """Delete all but the most recent folders; the current one becomes the most recent."""
    # Another process may be doing the same: what has gone meanwhile is no trouble.
    with suppress(OSError):
        os.utime(current)
        by_age = sorted(current.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in by_age[_KEPT_FOLDERS:]:
            shutil.rmtree(path, ignore_errors=True)
