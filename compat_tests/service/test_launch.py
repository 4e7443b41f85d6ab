"""An engine's process from its launch on, and what the process beside it need not import."""

import asyncio
import gc
import json
import socket
import subprocess
import sys

import pytest

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.service import engine_process, launch
from helix_gateway.service.launch import EngineProcess
from helix_gateway.service.process import ProcessService
from helix_gateway.service.settings import EngineSettings

HEAVY = ("torch", "numba", "scipy", "transformers.modeling_utils")
"""Not transformers itself: chat templates are written in its sandbox."""


async def test_a_process_that_is_told_nothing_ends_when_nobody_is_left_to_tell_it():
    process = EngineProcess()
    assert process.returncode is None
    process.close()
    assert await asyncio.wait_for(process.wait(), 60) == 3
    assert process.returncode == 3
    process.kill()


async def test_one_that_is_killed_says_so():
    process = EngineProcess()
    process.kill()
    assert await asyncio.wait_for(process.wait(), 60) == -9
    process.assign(b"{}")
    process.close()


async def test_a_service_takes_the_process_that_was_launched_before_it_and_no_other(monkeypatch):
    launched = EngineProcess()
    monkeypatch.setattr(launch, "ENGINE_COMMAND", ("/no/such/program",))
    service = ProcessService(EngineSettings(model_path="/no/such/model"), None, launched=launched)
    with pytest.raises(ModelLoadError, match="no model at /no/such/model"):
        await asyncio.wait_for(service.start(), 120)
    assert launched.returncode is not None
    with pytest.raises(FileNotFoundError):
        await service.start()


async def test_a_service_that_stops_before_it_started_ends_the_process_that_it_was_given():
    launched = EngineProcess()
    await ProcessService(EngineSettings(model_path="none"), None, launched=launched).stop()
    assert launched.returncode == -9


async def test_a_process_that_cannot_be_spoken_to_is_ended(monkeypatch):
    launched = EngineProcess()

    async def full(_process):
        raise OSError("no room for a connection")

    monkeypatch.setattr("helix_gateway.service.process.connected", full)
    service = ProcessService(EngineSettings(model_path="none"), None, launched=launched)
    with pytest.raises(OSError, match="no room"):
        await service.start()
    assert await asyncio.wait_for(launched.wait(), 60) == -9


def loopback_pair():
    """As `socket.socketpair` makes one where there are no Unix sockets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


def test_a_connection_over_loopback_keeps_no_message_back_at_either_end(monkeypatch):
    monkeypatch.setattr(socket, "socketpair", loopback_pair)
    ours, theirs = launch._pair()
    with ours, theirs:
        assert [end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0 for end in (ours, theirs)] == [True, True]


def test_a_gateway_imports_nothing_that_computes(smollm2_path):
    """All that `helix serve` imports and does until it is ready, in a process of its own."""
    program = f"""
import json, sys
import helix_gateway.cli.main, helix_gateway.cli.serve, helix_gateway.service.launch
from helix_gateway.cli import first_start
from helix_gateway.cli.serve import _render_once, _tracer
from helix_gateway.gateway import app, server
from helix_gateway.service import observer, process
from helix_gateway.telemetry import logging, metrics
from helix_gateway.text.tokenizer import Tokenizer
tokenizer = Tokenizer.load({smollm2_path!r})
assert "tiktoken" in sys.modules
_tracer(None)
_render_once(tokenizer)
assert tokenizer.has_fast_path
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(said.stdout.splitlines()[-1]) == []


def test_an_engine_looks_for_no_garbage_among_what_it_has_imported_and_does_elsewhere():
    program = """
import gc
from helix_gateway.service.engine_process import _import_what_is_heavy
_import_what_is_heavy()
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "True True"


def test_an_import_that_ends_its_thread_leaves_garbage_to_be_collected_all_the_same(monkeypatch):
    def ends(_name):
        raise SystemExit

    monkeypatch.setattr(engine_process, "import_module", ends)
    try:
        with pytest.raises(SystemExit):
            engine_process._import_what_is_heavy()
        assert gc.isenabled()
    finally:
        gc.enable()
