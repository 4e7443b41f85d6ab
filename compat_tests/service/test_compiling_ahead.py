"""The process that compiles, at a first start, what needs no model."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from helix_gateway.runtime.cpu.compiled import mark_compiled_ahead
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
               if isinstance(kernel, Dispatcher) and kernel.py_func.__module__.startswith(rooms)}
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


@pytest.mark.usefixtures("cores", "sleeping")
def test_where_all_of_it_was_compiled_ahead_it_does_not_run_again_however_little_that_is(tmp_path, monkeypatch):
    """As on a GPU, where nothing else is compiled."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    mark_compiled_ahead()
    assert CompilingAhead().pid is None


SLOW_TORCH = """
import pathlib, time
pathlib.Path(__file__).with_name("importing").touch()
time.sleep(60)
"""


def test_while_it_still_imports_it_ends_with_who_started_it_and_is_deaf_to_ctrl_c(tmp_path):
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join([str(tmp_path), *sys.path])}
    command = launch.COMPILING_COMMAND
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        while not (tmp_path / "importing").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.stdin.close()
        assert process.wait(20) == 3
        assert process.stderr.read() == b""
