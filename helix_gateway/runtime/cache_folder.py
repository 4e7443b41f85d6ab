"""Where Helix keeps what it can make or fetch again: downloaded models, compiled code, links to libraries.

Imports nothing heavy: it is asked before an engine's process starts.  Knows nothing about what lies there.
"""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$HELIX_CACHE``, or the system's place for a user's caches; it need not exist yet."""
    override = os.environ.get("HELIX_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("helix", appauthor=False)
