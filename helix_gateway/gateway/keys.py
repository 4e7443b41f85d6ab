"""The keys that clients may send: read from settings and a file, compared in constant time, each with a name.

A key is kept as a digest and known by its name; logs and limits use the name.  Knows nothing about HTTP.
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from helix_gateway.core.errors import HelixError


class KeyFileError(HelixError):
    """A file of keys cannot be used; the message names file and line, never a key."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key."""

    name: str
    digest: bytes


class KeyRing:
    """Every key that is let in.

    Args:
        keys: those without a name; they are called ``key-1``, ``key-2``, ….
        path: a file of more, see `read_key_file`.

    Raises:
        KeyFileError: the file cannot be used.
    """

    def __init__(self, keys: Sequence[str] = (), path: str | None = None) -> None:
        self._given = [ApiKey(f"key-{place}", digest(key)) for place, key in enumerate(keys, 1)]
        self._path = path
        self._keys = self._all()

    def __len__(self) -> int:
        return len(self._keys)

    def reload(self) -> None:
        """Read the file again; where that fails the old keys stay.

        Raises:
            KeyFileError: the file cannot be used.
        """
        self._keys = self._all()

    def _all(self) -> list[ApiKey]:
        if self._path is None:
            return self._given
        keys = self._given + read_key_file(self._path)
        _refuse_twins(self._path, keys)  # one given without a name may be called as one in the file is
        return keys

    def name_of(self, sent: str) -> str | None:
        """Whose key was sent; None: nobody's.  Takes the same time wherever the key differs, and from which."""
        found = digest(sent)
        names = [key.name for key in self._keys if hmac.compare_digest(key.digest, found)]
        return names[0] if names else None


def digest(key: str) -> bytes:
    """Of one length whatever the key, so that comparing tells nothing of its length either."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def read_key_file(path: str) -> list[ApiKey]:
    """The keys of a file: a line each, ``name: key`` or ``key``; empty lines and those that begin with # are skipped.

    Raises:
        KeyFileError: it cannot be read, holds no key, or a line is none; an empty file would let everybody in.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise KeyFileError(f"The file of keys {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise KeyFileError(f"The file of keys {path} is not UTF-8 text.") from None
    keys = [_parsed(path, number, line.strip()) for number, line in enumerate(lines, 1) if _holds_key(line)]
    if not keys:
        raise KeyFileError(f"The file of keys {path} holds no key; write one a line, as `name: key` or `key`.")
    _refuse_twins(path, keys)
    return keys


def _holds_key(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _parsed(path: str, number: int, line: str) -> ApiKey:
    before, colon, after = line.partition(":")
    name, key = (before.strip(), after.strip()) if colon else (f"line-{number}", line)
    if len(name.split()) != 1 or len(key.split()) != 1:
        raise KeyFileError(f"The file of keys {path} has a line {number} that is no `name: key` and no `key`.")
    return ApiKey(name, digest(key))


def _refuse_twins(path: str, keys: Iterable[ApiKey]) -> None:
    names: set[str] = set()
    for key in keys:
        if key.name in names:
            raise KeyFileError(
                f"The file of keys {path} has two keys called {key.name}, or one that is called as one given beside it."
            )
        names.add(key.name)
