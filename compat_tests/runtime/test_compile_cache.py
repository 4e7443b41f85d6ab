"""Where compiled code is kept, what makes it be made anew, and who writes it."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from numbers import Number
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numba import njit

import helix_gateway
from helix_gateway.runtime.cpu import compile_cache
from helix_gateway.runtime.cpu.compile_cache import compiled_sources

PACKAGE = Path(helix_gateway.__file__).parent
WHERE = "import os, helix_gateway.runtime.cpu; print(os.environ['NUMBA_CACHE_DIR'])"


def chosen_folder(named: Path) -> Path:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(named)}
    done = subprocess.run([sys.executable, "-c", WHERE], env=environment, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def test_in_a_folder_that_the_user_names_there_is_one_for_each_state_of_the_sources(tmp_path):
    others, older = tmp_path / "somebody_else", tmp_path / "helix-0123456789abcdef"
    for folder in (others, older):
        folder.mkdir()
    chosen = chosen_folder(tmp_path)
    assert chosen.parent == tmp_path
    assert chosen != older
    # A process that it starts finds it, and so does one that a process of another version starts.
    assert chosen_folder(chosen) == chosen
    assert chosen_folder(older) == chosen
    for number in range(16):
        (tmp_path / f"helix-{number:016x}").mkdir()
    os.utime(older, (0, 0))
    chosen_folder(tmp_path)
    assert others.exists()
    assert not older.exists()
    assert len(list(tmp_path.glob("helix-*"))) == 16


ENGINES_OWN = """
import helix_gateway.engine.acceptance as acceptance
from numba.core.dispatcher import Dispatcher
for kernel in vars(acceptance).values():
    if isinstance(kernel, Dispatcher):
        print(kernel._cache.cache_path)
"""


def test_the_engines_own_code_lies_there_too_whatever_is_imported_first(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment["HELIX_CACHE"] = str(tmp_path)
    command = [sys.executable, "-c", ENGINES_OWN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (folder,) = set(done.stdout.splitlines())
    assert Path(folder).parent.parent == tmp_path / "compiled"


def test_a_folder_that_cannot_be_written_is_replaced_by_one_that_can(tmp_path):
    (tmp_path / "file").touch()
    chosen = chosen_folder(tmp_path / "file")
    assert chosen.parent.name.startswith("helix-compiled-")
    assert not chosen.parent.exists()


SHARING = """
import os, subprocess, sys, time
from pathlib import Path
from helix_gateway.runtime.cpu import COMPILED_NOT_KEPT
folder = Path(os.environ["NUMBA_CACHE_DIR"])
print(folder, COMPILED_NOT_KEPT, flush=True)
assert folder.exists()
if sys.argv[1:]:
    (folder / "compiled").touch()
    if os.fork() == 0:
        sys.exit()
    os.wait()
    started = subprocess.run([sys.executable, "-c", sys.argv[1]], capture_output=True, text=True, check=True)
    print(started.stdout.strip())
    assert list(folder.iterdir()) == [folder / "compiled"]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_it_is_shared_by_all_that_is_started_and_deleted_by_who_made_it(tmp_path):
    (tmp_path / "file").touch()
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file")}
    command = [sys.executable, "-c", SHARING, SHARING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (maker, why), (started, why_started) = (line.split(" ", 1) for line in done.stdout.splitlines())
    assert why == f"{tmp_path / 'file'}: Not a directory"
    assert (started, why_started) == (maker, "None")
    assert not Path(maker).parent.exists()


ELSEWHERE = """
import os, sys
from helix_gateway.runtime.cpu.compiled import is_compiled, is_first_start, mark_compiled, mark_compiled_ahead
from compat_tests.runtime.test_compile_cache import kept_square
print(os.environ["NUMBA_CACHE_DIR"], is_first_start(), is_compiled("more"), kept_square(7.0))
print(*kept_square.stats.cache_hits)
mark_compiled_ahead()
mark_compiled("more")
"""
OTHER_PROCESSOR = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}


@njit(cache=True)
def kept_square(x):
    return x * x


def test_machines_that_share_a_folder_take_neither_code_nor_marks_of_each_other(tmp_path):
    def start(**told):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), **told}
        command = [sys.executable, "-c", ELSEWHERE]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        first, hits = done.stdout.splitlines()
        return first.split(), bool(hits)

    (here, *new), has_code = start()
    assert (new, has_code) == (["True", "False", "49.0"], False)
    (elsewhere, *new), has_code = start(**OTHER_PROCESSOR)
    assert (new, has_code) == (["True", "False", "49.0"], False)
    assert Path(here).parent == Path(elsewhere).parent == tmp_path
    assert start() == ([here, "False", "True", "49.0"], True)
    assert start(**OTHER_PROCESSOR) == ([elsewhere, "False", "True", "49.0"], True)


CPUINFO = "processor: 0\nmodel name\t: One\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags: x\n"


def test_a_processor_is_known_by_what_compilers_look_at(tmp_path, monkeypatch):
    def told(mhz, flags):
        (tmp_path / "cpuinfo").write_text(CPUINFO.format(mhz=mhz, flags=flags))
        return compile_cache._digest({})

    monkeypatch.setattr(compile_cache, "_CPUINFO", tmp_path / "cpuinfo")
    assert told(1000, "avx2") == told(2000, "avx2") != told(1000, "avx2 avx512f")
    monkeypatch.setattr(compile_cache, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr("platform.processor", lambda: "one")
    one = compile_cache._digest({})
    monkeypatch.setattr("platform.processor", lambda: "other")
    assert compile_cache._digest({}) != one


def test_the_sources_are_those_that_compiled_code_takes_functions_and_constants_from():
    sources = compiled_sources(PACKAGE)
    known = {"runtime/cpu/parts.py", "runtime/cpu/vector_math.py", "runtime/sampling/cpu_kernels.py"}
    assert known <= set(sources)
    assert "gateway/app.py" not in sources
    taken = [
        (place, module, name)
        for place, source in sources.items()
        if place.startswith(("runtime/", "engine/"))
        for module, name in imported_constants(source)
    ]
    assert ("runtime/cpu/quantised_step.py", "runtime/cpu/parts.py", "UNCAPPED") in taken
    assert ("engine/acceptance.py", "core/inner_functions.py", "INNER") in taken
    assert [constant for constant in taken if constant[1] not in sources] == []


def imported_constants(source: bytes):
    """What a source takes from others of the package and numba would build into code: numbers, and modules for theirs."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("helix_gateway."):
            continue
        module = import_module(node.module)
        for alias in node.names:
            value = getattr(module, alias.name)
            if isinstance(value, ModuleType):
                yield place_of(value), alias.name
            elif is_built_in(value):
                yield place_of(module), alias.name


def is_built_in(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(is_built_in, value))
    if isinstance(value, dict):  # what numba is told
        return all(map(is_built_in, value.values()))
    return isinstance(value, (Number, np.ndarray))


def place_of(module: ModuleType) -> str:
    return Path(module.__file__).relative_to(PACKAGE).as_posix()


WRITER = """
import sys, time
from pathlib import Path
import helix_gateway.runtime.cpu
from numba.core.caching import IndexDataCacheFile
from helix_gateway.runtime.cpu.compile_cache import write_in_turn
write_in_turn()
write_in_turn()
folder, name = Path(sys.argv[1]), sys.argv[2]
index = IndexDataCacheFile(str(folder), "function", "stamp")
(folder / name).touch()
while not (folder / "go").exists():
    time.sleep(0.001)
for number in range(100):
    index.save((name, number), (name, number))
"""


def test_two_processes_that_add_to_one_index_lose_and_cross_nothing(tmp_path):
    from numba.core.caching import IndexDataCacheFile

    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    names = ("one", "other")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name], env=environment) for name in names]
    while not all((tmp_path / name).exists() for name in names):
        assert all(writer.poll() is None for writer in writers)
    (tmp_path / "go").touch()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    index = IndexDataCacheFile(str(tmp_path), "function", "stamp")
    keys = [(name, number) for name in names for number in range(100)]
    assert [index.load(key) for key in keys] == keys
