"""Which versions of the libraries that matter are installed, without importing any.  Standard library only."""

import re
from importlib.metadata import PackageNotFoundError, version

NAMES = ("torch", "transformers", "numba", "aiohttp", "tokenizers", "huggingface-hub")
OLDEST = {"torch": (2, 4, 1), "transformers": (5, 12), "numba": (0, 61)}


def installed() -> dict[str, str | None]:
    """Version by name; None: it is not installed."""
    return {name: version_of(name) for name in NAMES}


def version_of(name: str) -> str | None:
    """The version of one distribution; None: it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def numbers_of(text: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` → (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3])
