"""Where Helix keeps what it can make or fetch again: downloaded models, compiled code, links to libraries.

Imports nothing heavy: it is asked before an engine's process starts.  Knows nothing about what lies there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_folder() -> Path:
    """``$HELIX_CACHE``, or the system's place for a user's caches; it need not exist yet."""
    override = os.environ.get("HELIX_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("helix", appauthor=False)


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Where to write what is to become ``file``: who reads meanwhile sees all of it or what was there before.

    Raises:
        OSError: there is no writing there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}")
    try:
        yield beside
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def forget_oldest(folder: Path, kept_files: int) -> None:
    """Delete all but so many files, the most recent."""
    # Another process may be doing the same: what has gone meanwhile is no trouble.
    with suppress(OSError):
        by_age = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in by_age[kept_files:]:
            file.unlink(missing_ok=True)
