"""What one start found out about a model, kept for the next: a few JSON values in Helix's cache folder.

A file holds what was found under the same circumstances: the model's files, the code, the versions of the libraries, the
processor and the settings, all written out beside the values.  Whatever differs gives another file, and what cannot be
read, or is not what was written, is as good as not there.  Knows nothing about what is found out.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import structlog

from helix_gateway.runtime.cache_folder import cache_folder, forget_oldest, written_whole

log = structlog.get_logger(__name__)

_KEPT_FILES = 32
_LIBRARIES = ("gguf", "llvmlite", "numba", "numpy", "safetensors", "torch", "transformers")
_TUNING = ("ATEN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "NUMBA_", "OMP_", "ONEDNN_", "TORCH_")
"""How variables begin that change what libraries compute with, or on how many threads."""
_NOT_TUNING = frozenset({"NUMBA_CACHE_DIR"})


class Remembered:
    """What is known of one model under certain circumstances, and what is found out now.

    Args:
        circumstances: whatever could change what is found out, as JSON can write it.
        folder: where its files lie.
    """

    def __init__(self, circumstances: Mapping[str, Any], folder: Path) -> None:
        self._circumstances = json.loads(json.dumps(circumstances))
        self._file = folder / f"{_digest(self._circumstances)[:32]}.json"
        self._found = self._read()

    def get(self, name: str) -> Any:
        """What was found out under this name; None where nothing was."""
        return self._found.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep a value that JSON can write; where the folder cannot be written, for this process only."""
        # As it will be read: other kinds of keys and sequences than JSON's do not come back.
        self._found[name] = json.loads(json.dumps(value))
        self._write()

    def forget(self, name: str) -> None:
        """Let nothing be known under this name."""
        if name in self._found:
            del self._found[name]
            self._write()

    def _write(self) -> None:
        content = {
            "circumstances": self._circumstances,
            "found": self._found,
            "digest": _digest([self._circumstances, self._found]),
        }
        try:
            with written_whole(self._file) as file:
                file.write_text(json.dumps(content, indent=1))
        except OSError as error:
            log.info("not_remembered", folder=str(self._file.parent), reason=str(error))
            return
        forget_oldest(self._file.parent, _KEPT_FILES)

    def hold_to(self, name: str, value: Any) -> None:
        """Forget everything unless it was found beside this very value, which is kept with it."""
        if self._found.get(name) != json.loads(json.dumps(value)):
            self._found.clear()
            self.put(name, value)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text())
            found: dict[str, Any] = content["found"]
            if content["digest"] != _digest([self._circumstances, found]):
                raise ValueError("it is not what was written")
            with suppress(OSError):  # what is used is kept longest
                os.utime(self._file)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("remembered_file_ignored", file=str(self._file), reason=repr(error))
            return {}
        return found


class NothingRemembered(Remembered):
    """Nothing is known, and what is found out is forgotten with the process."""

    def __init__(self) -> None:
        self._found = {}

    def put(self, name: str, value: Any) -> None:
        """See `Remembered`."""
        self._found[name] = value

    def _write(self) -> None:
        """Nowhere."""


def remembered_folder() -> Path:
    """Where its files lie; deleting it makes all be found out again."""
    return cache_folder() / "remembered"


def file_identities(path: str | Path) -> list[list[Any]]:
    """What changes when a file, or any file of a folder, is written: where it lies, its size, its times, its number.

    The time of the last change of status cannot be set back by whoever copies times along.
    """
    place = Path(path)
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [_identity(file) for file in files if file.is_file()]


def _identity(file: Path) -> list[Any]:
    real = file.resolve()
    stat = real.stat()
    return [str(file.absolute()), str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def surroundings() -> dict[str, Any]:
    """The code, the libraries and the machine, as far as they change what a model computes or how long it takes."""
    from numba.core.codegen import get_host_cpu_features
    from torch.backends import cpu

    from helix_gateway.runtime.cpu.instruction_sets import target_features
    from helix_gateway.runtime.cpu.threads import wanted_threads

    return {
        "code": code_digest(Path(__file__).parent.parent),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "machine": [platform.system(), platform.machine(), _processor_name()],
        "instructions": [get_host_cpu_features(), sorted(target_features()), cpu.get_cpu_capability()],
        "threads": wanted_threads(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_TUNING) and name not in _NOT_TUNING
        },
    }


@cache
def code_digest(folder: Path) -> str:
    """A name for the state of all Python sources under a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _processor_name() -> str:
    """The processor's own name where Linux tells it: machines of one instruction set differ in speed."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
