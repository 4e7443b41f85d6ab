"""Everything that the doctor looks at, in order, each finding as soon as it is known."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from helix_gateway.cli.doctor import checks, packages
from helix_gateway.runtime.hardware import inspect_hardware
from helix_gateway.service.findings import Finding

SELF_TEST_TIMEOUT_S = 300.0
"""The first run compiles kernels, which took up to a minute on a quiet machine of two cores."""


def examine_machine() -> Iterator[Finding]:
    """What is there, without trying it."""
    hardware = inspect_hardware()
    versions = packages.installed()
    yield checks.check_python()
    yield checks.check_processor(hardware)
    load = checks.check_load(hardware)
    if load is not None:
        yield load
    yield checks.check_memory(hardware)
    yield from checks.check_gpus(hardware, versions["torch"])
    yield from checks.check_packages(versions)


def examine_places(port: int) -> Iterator[Finding]:
    """Where Helix keeps things, and where it would listen."""
    from helix_gateway.runtime.cache_folder import cache_folder
    from helix_gateway.runtime.sources.default_model import default_model_path

    folder = cache_folder()
    yield checks.check_cache(folder, _can_be_written(folder), _free_bytes(folder))
    yield checks.check_default_model(default_model_path(), default_model_path().is_file())
    yield checks.check_port(port, _why_not_listening(port))


def examine_engine() -> Iterator[Finding]:
    """How an engine fares: the self-test."""
    from helix_gateway.service.self_test_process import run_self_test

    yield from run_self_test(SELF_TEST_TIMEOUT_S)


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".doctor-{os.getpid()}"
        probe.write_bytes(b"?")
        probe.unlink()
    except OSError:
        return False
    return True


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _why_not_listening(port: int) -> str | None:
    with socket.socket() as listener:
        if os.name != "nt":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            return error.strerror or str(error)
    return None
