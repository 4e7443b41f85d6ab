"""A real `helix serve` told to stop while it streams."""

import json
import signal
import threading
import time

import httpx
import pytest

from compat_tests.serving import start_server

pytestmark = pytest.mark.alone

TOKENS = 80
BODY = {
    "messages": [{"role": "user", "content": "Count."}],
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "max_tokens": TOKENS,
}


def read_stream(url, events):
    with httpx.stream("POST", url + "/v1/chat/completions", json=BODY, timeout=60) as response:
        events += [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


def running(url):
    lines = httpx.get(url + "/metrics").text.splitlines()
    (count,) = [line.split()[-1] for line in lines if line.startswith("helix:num_requests_running")]
    return float(count)


def test_eight_streams_finish_after_sigterm_and_the_exit_code_is_zero(smollm2_path):
    server = start_server(smollm2_path, "--kv-cache-memory", "512MiB")
    streams = [[] for _ in range(8)]
    threads = [threading.Thread(target=read_stream, args=(server.url, events)) for events in streams]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while running(server.url) != 8:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.process.send_signal(signal.SIGTERM)
    while httpx.get(server.url + "/ready").json()["status"] != "draining":
        assert time.monotonic() < deadline
    refused = httpx.post(server.url + "/v1/completions", json={"prompt": "Hi"})
    assert refused.status_code == 503
    assert refused.headers["Retry-After"]
    for thread in threads:
        thread.join(60)
    for events in streams:
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["usage"]["completion_tokens"] == TOKENS
    assert server.process.wait(20) == 0
    assert [line for line in server.lines if "in flight (8)" in line]
    assert not [line for line in server.lines if "Traceback" in line]
