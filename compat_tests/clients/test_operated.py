"""A running server as its operator sees it: metrics and logs before, under and after load, and when the engine dies."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from compat_tests.clients.test_engine_death import children_of
from compat_tests.scraping import Scrape
from compat_tests.serving import start_server, stop_server

pytestmark = pytest.mark.alone

SECRET = "The marmalade protocol of Ulan Bator"


@pytest.fixture(scope="module")
def operated(smollm2_path, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "helix.log"
    running = start_server(
        smollm2_path, "--kv-cache-memory", "256MiB", "--served-model-name", "smollm2", "--log-file", str(log)
    )
    running.log = log
    yield running
    stop_server(running)


def scrape(server):
    began = time.monotonic()
    response = httpx.get(server.url + "/metrics", timeout=5)
    assert response.status_code == 200
    return Scrape(response.text), time.monotonic() - began


def ask(server, number, **fields):
    """Usage of one answer."""
    body = {
        "prompt": f"{SECRET}, chapter {number}:",
        "max_tokens": 20 + number,
        "ignore_eos": True,
        "n": 1 + number % 2,
    }
    response = httpx.post(server.base_url + "/completions", json={**body, **fields}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["usage"]


def until(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_metrics_add_up_before_under_and_after_load_and_when_the_engine_dies(operated):
    before, _ = scrape(operated)
    assert before.value("generation_tokens_total", model_name="smollm2") == 0
    assert before.value("prefix_cache_queries_total") == 0, "the warm-up counts as nobody's"
    assert before.value("kv_blocks_total") > 0
    assert before.value("engine_state", state="ready") == 1

    with ThreadPoolExecutor(8) as pool:
        # Long enough for scrapes to find them running: eight answers of 20 tokens are over in a third of a second.
        answers = [pool.submit(ask, operated, number, max_tokens=150 + number) for number in range(8)]
        until(lambda: scrape(operated)[0].value("num_requests_running") > 1, "nobody is seen running")
        usages = [answer.result() for answer in answers]
    after, _ = scrape(operated)
    sums = {key: sum(usage[key] for usage in usages) for key in ("prompt_tokens", "completion_tokens")}
    assert after.value("prompt_tokens_total") == after.value("prefix_cache_queries_total") == sums["prompt_tokens"]
    assert after.value("generation_tokens_total") == sums["completion_tokens"]
    assert after.value("request_success_total", finished_reason="length") == 12
    assert after.value("time_to_first_token_seconds_count") == 12
    assert after.value("e2e_request_latency_seconds_count") == 12
    until(lambda: scrape(operated)[0].value("num_requests_running") == 0, "somebody runs for ever")
    assert scrape(operated)[0].value("kv_blocks_referenced") == 0

    (engine,) = children_of(operated.process.pid)
    with ThreadPoolExecutor(3) as pool:
        dying = [pool.submit(ask, operated, 0, max_tokens=2000) for _ in range(3)]
        until(lambda: scrape(operated)[0].value("num_requests_running") == 3, "nobody is seen running")
        os.kill(engine, signal.SIGKILL)
        assert all(answer.exception() is not None for answer in dying)
    died, seconds = scrape(operated)
    assert seconds < 1
    assert died.value("engine_state", state="restarting") == 1
    assert died.value("num_requests_running") == died.value("kv_cache_usage_perc") == 0
    assert died.value("request_success_total", finished_reason="error") == 3
    assert died.value("prompt_tokens_total") >= sums["prompt_tokens"]
    assert died.value("generation_tokens_total") > sums["completion_tokens"]

    until(lambda: httpx.get(operated.url + "/ready").status_code == 200, "the engine does not come back")
    usage = ask(operated, 9)
    again, _ = scrape(operated)
    assert again.value("engine_restarts_total") == 1
    assert again.value("generation_tokens_total") == died.value("generation_tokens_total") + usage["completion_tokens"]
    assert again.value("prompt_tokens_total") == died.value("prompt_tokens_total") + usage["prompt_tokens"]
    assert again.value("http_requests_total", route="/completions", status="503") == 3


def test_the_log_has_a_line_for_each_request_and_nothing_of_what_was_asked(operated):
    usage = ask(operated, 3)
    text = operated.log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    line = [line for line in lines if line["event"] == "request" and line["path"] == "/v1/completions"][-1]
    assert (line["status"], line["model"], line["role"]) == (200, "smollm2", "gateway")
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["completion_tokens"] == usage["completion_tokens"]
    assert line["finish_reasons"] == ["length", "length"]
    assert line["time_to_first_token_ms"] > 0 < line["tokens_per_s"]
    assert {line["role"] for line in lines} == {"gateway", "engine"}
    assert "marmalade" not in text + "".join(operated.lines)


def test_a_log_that_cannot_be_written_ends_the_server_with_one_line(smollm2_path):
    command = [sys.executable, "-m", "helix_gateway", "serve", smollm2_path, "--port", "0", "--log-file", "/dev/full"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    line = "helix: The log file /dev/full cannot be written: No space left on device; see --log-file.\n"
    assert (ended.stdout, ended.stderr) == ("", line)
