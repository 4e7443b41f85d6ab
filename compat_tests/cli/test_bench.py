"""``helix bench``: what it measures is what happened, and it says so in a table, in JSON and in a picture."""

import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import time

import pytest
from fake_service import ANSWER, FakeService, metrics_of
from server_thread import ServerThread
from typer.testing import CliRunner

from helix_gateway.cli.load.level import Concurrency, Level, Limit, PoissonRate, RequestRecord
from helix_gateway.cli.load.prompts import RequestOptions, read_prompts, synthetic
from helix_gateway.cli.load.report import remarks
from helix_gateway.cli.load.summary import percentile, summarise
from helix_gateway.cli.main import app
from helix_gateway.cli.openai_client import OpenAIClient, ServerError, normalised
from helix_gateway.core.errors import HelixError
from helix_gateway.service.api import TextDelta

TOKENS = len(ANSWER.encode())


def bench(server, *arguments):
    return CliRunner().invoke(app, ["bench", "--base-url", server.url, "--warm-up", "0", *arguments])


def figures_of(server, tmp_path, *arguments):
    result = bench(server, "--output", str(tmp_path / "out.json"), *arguments)
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "out.json").read_text())


async def run_level(url, load, limit, api="chat", timeout_s=10.0):
    options = RequestOptions("tiny", api, max_tokens=64)
    async with OpenAIClient(url, timeout_s=timeout_s) as client:
        level = Level(client, api, (options.body(prompt) for prompt in synthetic(0, prompt_tokens=8)), load, limit)
        await level.run()
    return level


def test_every_request_is_counted_with_the_tokens_that_the_server_tells(server, tmp_path):
    figures = figures_of(server, tmp_path, "--concurrency", "1,3", "--num-requests", "4")
    assert [level["load"] for level in figures["levels"]] == ["1 at once", "3 at once"]
    for level in figures["levels"]:
        assert (level["finished"], level["failed"], level["cancelled"]) == (4, 0, 0)
        assert level["output_tokens"] == 4 * TOKENS
        assert level["cached_tokens"] == 4 * 3
        assert level["tokens_counted_by_server"]
        assert level["output_tokens_per_s"] == pytest.approx(level["output_tokens"] / level["elapsed_s"])
    assert len(server.service.calls) == 8


def test_the_table_and_the_picture_show_the_same(server, tmp_path):
    result = bench(server, "--concurrency", "2", "--num-requests", "2", "--plot", str(tmp_path / "a.png"))
    assert "output tokens/s" in result.output
    assert "2 at once" in result.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_times_are_those_of_the_clock():
    """A server that waits before the first token, and for less before each other one."""

    async def slowly(call):
        for place, character in enumerate("abcd"):
            time_s = 0.2 if place == 0 else 0.05
            await asyncio_sleep(time_s)
            last = place == 3
            yield TextDelta(
                index=0, text=character, token_ids=[ord(character)], finish_reason="stop" if last else None,
                metrics=metrics_of(call, 4) if last else None,
            )  # fmt: skip

    from asyncio import run
    from asyncio import sleep as asyncio_sleep

    service = FakeService()
    service.script = slowly
    with ServerThread(service) as server:
        summary = summarise(run(run_level(server.url, Concurrency(1), Limit(requests=3))))
    assert 0.2 <= summary.ttft_s.p50 < 2
    assert 0.05 <= summary.gap_s.p50 < 1
    assert 0.05 <= summary.time_per_output_token_s.p50 < 1
    assert summary.e2e_s.p50 >= 0.35
    assert summary.ttft_s.p50 <= summary.ttft_s.p90 <= summary.ttft_s.p99 <= summary.ttft_s.max


async def test_no_more_requests_run_at_once_than_asked_for():
    most = 0

    def watch(call):
        nonlocal most
        most = max(most, service.open)
        return service._answer(call)

    service = FakeService(token_s=0.002)
    service.script = watch
    with ServerThread(service) as server:
        await run_level(server.url, Concurrency(3), Limit(requests=9))
    assert most == 3


async def test_random_arrivals_come_at_the_rate_whatever_the_server_does():
    with ServerThread(FakeService(token_s=0.05)) as server:
        level = await run_level(server.url, PoissonRate(50.0, seed=1), Limit(requests=40))
    due = [record.due_s - level.started_s for record in level.records]
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert 0.01 < statistics.mean(gaps) < 0.04
    assert statistics.stdev(gaps) > 0.5 * statistics.mean(gaps), "Poisson, not a metronome"
    assert due[-1] < level.elapsed_s - TOKENS * 0.05 + 0.2, "the last was sent before earlier ones had ended"


async def test_a_duration_ends_the_sending_and_the_running_ones_are_waited_for():
    with ServerThread(FakeService(token_s=0.01)) as server:
        level = await run_level(server.url, Concurrency(2), Limit(duration_s=0.4))
    assert all(record.done for record in level.records)
    assert len(level.records) > 2
    assert level.elapsed_s < 20


async def test_errors_are_counted_by_what_they_say():
    async def fail(call):
        yield TextDelta(index=0, text="x", token_ids=[1])
        yield TextDelta(index=0, text="", token_ids=[], finish_reason="error", error="The step failed.")

    service = FakeService()
    service.script = fail
    with ServerThread(service) as server:
        summary = summarise(await run_level(server.url, Concurrency(2), Limit(requests=4)))
    assert (summary.finished, summary.failed) == (0, 4)
    assert list(summary.errors.values()) == [4]
    assert "The step failed." in next(iter(summary.errors))
    assert summary.ttft_s is None
    assert any("4 ×" in remark for remark in remarks([summary]))


async def test_an_answer_that_takes_too_long_is_an_error():
    with ServerThread(FakeService(token_s=1.0)) as server:
        level = await run_level(server.url, Concurrency(1), Limit(requests=1), timeout_s=0.3)
    assert "0.3 s" in level.records[0].error


def test_a_server_that_is_not_there_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "helix_gateway", "bench", "--base-url", "http://127.0.0.1:9"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "127.0.0.1:9" in done.stderr


def test_ctrl_c_cancels_what_runs_and_tells_what_was_had(tmp_path):
    with ServerThread(FakeService(token_s=0.02)) as server:
        command = [sys.executable, "-m", "helix_gateway", "bench", "--base-url", server.url, "--warm-up", "0"]
        command += ["--concurrency", "2,4", "--num-requests", "1000", "--output", str(tmp_path / "out.json")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            server.wait_until(lambda service: len(service.calls) >= 5, timeout_s=20)
            process.send_signal(signal.SIGINT)
            shown, said = process.communicate(timeout=20)
        server.wait_until(lambda service: service.open == 0)
    assert process.returncode == 130, said
    assert "interrupted" in shown
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["interrupted"]
    (level,) = figures["levels"]
    assert level["finished"] >= 3
    assert level["cancelled"] == 2


def test_prompts_of_a_file_are_asked_in_order_and_again_when_they_run_out(server, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"messages": [{"role": "user", "content": "two"}], "max_tokens": 2}\n')
    figures = figures_of(server, tmp_path, "--prompts", str(file), "--concurrency", "1", "--num-requests", "3")
    asked = [bytes(token for token in call.request.prompt_token_ids if token < 256) for call in server.service.calls]
    assert [b"one" in text for text in asked] == [True, False, True]
    assert [call.request.sampling.max_tokens for call in server.service.calls] == [128, 2, 128]
    assert figures["levels"][0]["output_tokens"] == 2 * TOKENS + 2


def test_completions_are_asked_with_plain_text(server, tmp_path):
    figures_of(server, tmp_path, "--api", "completions", "--num-requests", "1", "--concurrency", "1")
    text = bytes(token for token in server.service.calls[0].request.prompt_token_ids if token < 256)
    assert text.startswith(b"Go on with this story")


@pytest.mark.parametrize(
    "line", ["not json", "[]", "{}", '{"messages": [{"role": "user"}]}', '{"prompt": "x", "max_tokens": 0}']
)
def test_a_bad_line_in_a_file_of_prompts_is_named(line, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(HelixError, match="line 2"):
        read_prompts(file)


def test_made_up_lengths_are_spread_as_they_are_said_to_be():
    prompts = list(itertools.islice(synthetic(7, prompt_tokens=100, output_tokens=200), 4000))
    assert prompts == list(itertools.islice(synthetic(7, prompt_tokens=100, output_tokens=200), 4000))
    assert len({prompt.text for prompt in prompts[:500]}) == 500
    logs = [math.log(prompt.max_tokens) for prompt in prompts]
    assert statistics.mean(logs) == pytest.approx(math.log(200) - 0.5, abs=0.06)
    assert statistics.stdev(logs) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--concurrency", "0"], "--concurrency"),
        (["--concurrency", "1,x"], "--concurrency"),
        (["--concurrency", "1", "--rate", "1"], "exclude"),
        (["--rate", "nan"], "--rate"),
        (["--num-requests", "0"], "--num-requests"),
        (["--temperature", "3"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--duration", "inf"], "--duration"),
        (["--timeout", "nan"], "--timeout"),
    ],
)
def test_a_wrong_flag_names_itself(arguments, said):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert said in result.output


def test_a_place_that_cannot_be_written_is_told_before_the_load(server, tmp_path):
    result = bench(server, "--output", str(tmp_path / "missing" / "out.json"))
    assert isinstance(result.exception, HelixError)
    assert "missing" in str(result.exception)
    assert server.service.calls == []


def test_without_matplotlib_a_picture_is_refused_with_what_to_install(server, monkeypatch, tmp_path):
    monkeypatch.setattr("helix_gateway.cli.load.report.find_spec", lambda name: None)
    result = bench(server, "--plot", str(tmp_path / "a.png"))
    assert "helix-gateway[bench]" in str(result.exception)


def test_percentiles_lie_between_neighbours():
    assert percentile([1.0], 0.99) == 1.0
    assert percentile([0.0, 1.0], 0.5) == 0.5
    assert percentile([float(number) for number in range(101)], 0.9) == 90.0


@pytest.mark.parametrize(
    "given,meant",
    [
        ("http://a:1", "http://a:1/v1"),
        ("http://a:1/", "http://a:1/v1"),
        ("https://a/v1/", "https://a/v1"),
        (" http://a/api/v3 ", "http://a/api/v3"),
    ],
)
def test_base_urls_are_taken_as_people_write_them(given, meant):
    assert normalised(given) == meant


@pytest.mark.parametrize("given", ["", "a:1", "ftp://a", "http://", "http://[", "http://a:99999"])
def test_what_is_no_url_is_refused_with_an_example(given):
    with pytest.raises(ServerError, match="http://127"):
        normalised(given)


def test_a_record_without_an_end_is_neither_done_nor_failed():
    record = RequestRecord(0.0)
    assert not record.done
    assert record.error is None


def test_the_client_is_quick_enough_not_to_be_what_is_measured(server):
    """Less than 100 µs of this process's time for each piece of a stream (a token of a fast model takes 2,000)."""
    from asyncio import run

    pieces = 2000
    server.service.answer = "x" * pieces

    async def read():
        body = RequestOptions("tiny", max_tokens=pieces).body(next(synthetic(0)))
        async with OpenAIClient(server.url) as client:
            count = 0
            start_s = time.thread_time()
            async for piece in client.stream("chat", body):
                count += bool(piece.text)
            return count, time.thread_time() - start_s

    count, seconds = run(read())
    assert count == pieces
    assert seconds / pieces < 100e-6
