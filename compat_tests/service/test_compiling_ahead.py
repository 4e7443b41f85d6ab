"""The process that compiles, at a first start, what needs no model."""

import json
import subprocess
import sys

import psutil
import pytest

from helix_gateway.service import launch
from helix_gateway.service.launch import CompilingAhead

_FOUND = """
import json, sys
from numba.core.dispatcher import Dispatcher
from helix_gateway.service.compiling_ahead import compile_ahead

def compiled():
    rooms = ("helix_gateway.engine", "helix_gateway.runtime.sampling")
    modules = [module for name, module in sys.modules.items() if name.startswith(rooms)]
    kernels = {kernel.py_func: kernel for module in modules for kernel in vars(module).values()
               if isinstance(kernel, Dispatcher)}
    return {f"{function.__module__}.{function.__name__}: {types}"
            for function, kernel in kernels.items() for types in kernel.signatures}

compile_ahead()
ahead = compiled()
from helix_gateway.service.host import EngineHost
from helix_gateway.service.settings import EngineSettings
EngineHost(EngineSettings(model_path=sys.argv[1]))
print(json.dumps([len(ahead), sorted(compiled() - ahead)]))
"""


def test_an_engine_compiles_nothing_of_sampling_or_drafting_that_was_not_compiled_ahead(smollm2_path):
    said = subprocess.run([sys.executable, "-c", _FOUND, smollm2_path], capture_output=True, text=True, check=True)
    count, missing = json.loads(said.stdout.splitlines()[-1])
    assert count > 10
    assert missing == []


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(launch, "usable_cores", lambda: 2)


@pytest.fixture
def sleeping(monkeypatch):
    monkeypatch.setattr(launch, "COMPILING_COMMAND", (sys.executable, "-c", "import sys; sys.stdin.read()"))


@pytest.mark.usefixtures("cores", "sleeping")
def test_it_runs_at_a_first_start_only_and_ends_when_nobody_needs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    compiling = CompilingAhead()
    assert psutil.pid_exists(compiling.pid)
    compiling.close()
    compiling.close()
    assert not psutil.pid_exists(compiling.pid)
    for number in range(60):
        (tmp_path / f"{number}.nbc").touch()
    compiling = CompilingAhead()
    assert compiling.pid is None
    compiling.close()


@pytest.mark.usefixtures("sleeping")
def test_one_core_is_left_to_the_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "usable_cores", lambda: 1)
    assert CompilingAhead().pid is None


@pytest.mark.usefixtures("cores")
def test_a_process_that_cannot_be_started_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "COMPILING_COMMAND", ("/no/such/program",))
    assert CompilingAhead().pid is None


def test_it_does_not_outlive_who_started_it(tmp_path):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen(launch.COMPILING_COMMAND, stdin=subprocess.PIPE, env=environment) as process:
        process.stdin.close()
        assert process.wait(60) == 3
