"""What clients see when the engine is killed under them."""

import asyncio
import json
import os
import signal
import subprocess
import threading
import time

import httpx
import pytest

from compat_tests.serving import start_server, stop_server
from helix_gateway.service import process
from helix_gateway.service.process import ProcessService
from helix_gateway.service.settings import EngineSettings
from helix_gateway.text.tokenizer import Tokenizer

pytestmark = pytest.mark.alone


@pytest.fixture
def own_server(smollm2_path):
    running = start_server(smollm2_path, "--kv-cache-memory", "512MiB", "--served-model-name", "smollm2")
    yield running
    stop_server(running)


def children_of(pid):
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "engine_process" in line]


def is_running(pid):
    return os.path.exists(f"/proc/{pid}")


def stream_events(url, events, started):
    body = {"messages": [{"role": "user", "content": "Count to 1000."}], "stream": True, "ignore_eos": True}
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                started.set()


def test_sixteen_streams_end_with_an_error_and_a_new_engine_serves(own_server):
    (engine,) = children_of(own_server.process.pid)
    streams = [([], threading.Event()) for _ in range(16)]
    threads = [threading.Thread(target=stream_events, args=(own_server.url, *stream)) for stream in streams]
    for thread in threads:
        thread.start()
    for _, started in streams:
        assert started.wait(60)
    os.kill(engine, signal.SIGKILL)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    for events, _ in streams:
        assert events[-1] != "[DONE]"
        error = json.loads(events[-1])["error"]
        assert error["code"] == "engine_unavailable"
    assert httpx.get(own_server.url + "/health").status_code == 200
    refused = httpx.post(own_server.url + "/v1/completions", json={"prompt": "Hi"})
    assert refused.status_code in (200, 503)
    deadline = time.monotonic() + 60
    while httpx.get(own_server.url + "/ready").status_code != 200:
        assert time.monotonic() < deadline, own_server.lines
        time.sleep(0.2)
    body = {"prompt": "The capital of France is", "temperature": 0}
    answer = httpx.post(own_server.url + "/v1/completions", json=body, timeout=60)
    assert "Paris" in answer.json()["choices"][0]["text"]
    assert children_of(own_server.process.pid) != [engine]


def test_the_engine_ends_with_its_gateway(own_server):
    (engine,) = children_of(own_server.process.pid)
    own_server.process.kill()
    own_server.process.wait()
    deadline = time.monotonic() + 10
    while is_running(engine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(engine)


def test_a_server_that_is_told_twice_to_stop_tells_its_clients(own_server):
    streams = [([], threading.Event()) for _ in range(4)]
    threads = [threading.Thread(target=stream_events, args=(own_server.url, *stream)) for stream in streams]
    for thread in threads:
        thread.start()
    for _, started in streams:
        assert started.wait(60)
    own_server.process.send_signal(signal.SIGINT)
    while not [line for line in own_server.lines if "in flight (4)" in line]:
        time.sleep(0.01)
    own_server.process.send_signal(signal.SIGINT)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    for events, _ in streams:
        assert json.loads(events[-1])["error"]["code"] == "engine_unavailable"
    assert own_server.process.wait(20) == 0
    assert not [line for line in own_server.lines if "Traceback" in line or "never retrieved" in line]


def test_an_engine_that_hangs_is_replaced(smollm2_path):
    async def scenario():
        settings = EngineSettings(model_path=smollm2_path, kv_cache_memory_bytes=64 << 20)
        service = ProcessService(settings, Tokenizer.load(smollm2_path), heartbeat_timeout_s=4.0)
        await service.start()
        try:
            hung = service.engine_pid
            os.kill(hung, signal.SIGSTOP)
            deadline = time.monotonic() + 60
            while service.engine_pid in (hung, None) or service.state != "ready":
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            assert not is_running(hung)
        finally:
            await service.stop()

    asyncio.run(scenario())


async def test_a_restart_that_fails_is_tried_again(smollm2_path, monkeypatch):
    settings = EngineSettings(model_path=smollm2_path, kv_cache_memory_bytes=64 << 20)
    service = ProcessService(settings, Tokenizer.load(smollm2_path))
    await service.start()
    try:
        real, failures = process._start_engine, [OSError("no memory"), OSError("no memory")]

        async def start(*arguments):
            if failures:
                raise failures.pop()
            return await real(*arguments)

        monkeypatch.setattr(process, "_start_engine", start)
        monkeypatch.setattr(process, "_RESTART_PAUSE_S", (0.0,))
        os.kill(service.engine_pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while failures or service.state != "ready":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
    finally:
        await service.stop()
    assert service.state == "stopped"
