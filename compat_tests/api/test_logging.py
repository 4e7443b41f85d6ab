"""Logs are JSON lines for machines and readable for people, and nobody's request fails for them."""

import errno
import io
import json
import logging
import subprocess
import sys

import pytest
import structlog
from conftest import chat_body, running

from helix_gateway.core.event import SequenceMetrics
from helix_gateway.core.stats import DraftCounts, StepSeconds
from helix_gateway.gateway.reply import Tally
from helix_gateway.service.api import TextDelta
from helix_gateway.telemetry.log_stream import LogStream, to_stream
from helix_gateway.telemetry.logging import configure_engine_logging, configure_logging, log_to
from helix_gateway.telemetry.settings import LogSettings

REQUEST = {
    "request_id": "req_1", "method": "POST", "path": "/v1/chat/completions", "status": 200, "duration_ms": 1533.2,
    "model": "smollm2", "stream": False, "choices": 1, "prompt_tokens": 31, "completion_tokens": 64, "cached_tokens": 0,
    "queue_ms": 0.1, "time_to_first_token_ms": 35.2, "tokens_per_s": 42.4, "draft_tokens": 0, "accepted_tokens": 0,
    "finish_reasons": ["stop"], "error": None, "param": None,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def logged_to(stream, **settings):
    log_to(to_stream(stream), LogSettings(**settings))
    return structlog.get_logger()


def test_a_pipe_gets_json_lines():
    stream = io.StringIO()
    log = logged_to(stream)
    log.info("served", tokens=5, nothing=None)
    log.debug("too quiet to hear")
    logging.getLogger("aiohttp.server").error("from the %s library", "standard")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["tokens"], first["level"], first["role"]) == ("served", 5, "info", "gateway")
    assert (second["event"], second["level"], second["role"]) == ("from the standard library", "error", "gateway")
    assert "timestamp" in first
    assert "timestamp" in second
    assert "nothing" not in first


def test_an_exception_is_one_line_of_json():
    stream = io.StringIO()
    log = logged_to(stream)
    try:
        raise ValueError("broken")
    except ValueError as error:
        log.error("failed", exc_info=error)
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: broken" in json.loads(line)["exception"]


def test_a_terminal_gets_text():
    stream = Terminal()
    logged_to(stream, level="debug").debug("served", tokens=5)
    assert "served" in stream.getvalue()
    with pytest.raises(json.JSONDecodeError):
        json.loads(stream.getvalue())


@pytest.mark.parametrize("make, form, is_json", [(io.StringIO, "console", False), (Terminal, "json", True)])
def test_the_format_can_be_asked_for(make, form, is_json):
    stream = make()
    logged_to(stream, format=form).info("served")
    assert stream.getvalue().startswith("{") is is_json


def test_a_request_reads_at_a_glance():
    stream = io.StringIO()
    log = logged_to(stream, format="console")
    log.info("request", **REQUEST)
    drafted = {
        "draft_tokens": 80,
        "accepted_tokens": 48,
        "drafters": {"suffix": {"drafted": 80, "accepted": 48, "accepted_per_position": [30, 18]}},
        "depths": [3, 0, 40],
        "draft_ms": 1.5,
        "verify_ms": 900.0,
        "sample_ms": 12.0,
    }
    log.info("request", **{**REQUEST, "cached_tokens": 16, "queue_ms": 210.0, **drafted})
    plain, busy = (line.split("] ", 1)[1].strip() for line in stream.getvalue().splitlines())
    assert plain == (
        "POST /v1/chat/completions 200 took=1.53s model=smollm2 in=31 out=64 ttft=35ms rate=42/s end=stop id=req_1"
    )
    assert (
        "cached=16 out=64 queue=210ms ttft=35ms rate=42/s drafted=80 accepted=48 by=suffix:48/80 end=stop id=req_1"
        in busy
    )


def test_a_log_that_cannot_be_written_is_one_clear_line_at_the_start(tmp_path):
    for path in (tmp_path / "no" / "such" / "folder.log", "/dev/full"):
        with pytest.raises(OSError, match=f"The log file {path} cannot be written: .*; see --log-file"):
            configure_logging(LogSettings(file=str(path)))


def test_an_engine_starts_all_the_same_where_the_log_cannot_be_written(capsys):
    configure_engine_logging(LogSettings(file="/dev/full"))
    assert json.loads(capsys.readouterr().err)["event"] == "log_file_unavailable"


def test_two_processes_may_share_a_log_file(tmp_path):
    path = tmp_path / "helix.log"
    configure_logging(LogSettings(file=str(path)))
    code = (
        "import structlog; from helix_gateway.telemetry import logging, settings;"
        f"logging.configure_engine_logging(settings.LogSettings(file={str(path)!r}));"
        "structlog.get_logger().info('theirs')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    structlog.get_logger().info("ours")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["event"], line["role"]) for line in lines] == [
        ("log_opened", "gateway"),
        ("log_opened", "engine"),
        ("theirs", "engine"),
        ("ours", "gateway"),
    ]
    assert lines[0]["pid"] != lines[1]["pid"]


class FullDisk:
    """Takes lines while there is room."""

    def __init__(self):
        self.lines, self.full = [], False

    def write(self, text):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.lines += text.splitlines()


async def test_a_disk_that_fills_fails_no_request_and_the_log_says_what_is_missing():
    disk = FullDisk()
    log_to(LogStream(disk.write, is_terminal=False), LogSettings())
    async with running() as gateway:
        await gateway.chat()
        disk.full = True
        for _ in range(3):
            await gateway.chat()
        disk.full = False
        for _ in range(2):
            await gateway.chat()
    events = [json.loads(line) for line in disk.lines]
    assert [line.get("lost_lines_before") for line in events] == [None, 3, None]


async def test_whoever_read_the_log_may_leave():
    closed = io.StringIO()
    log = logged_to(closed)
    closed.close()
    log.info("nobody reads this")
    async with running() as gateway:
        await gateway.chat()


@pytest.mark.parametrize("log_prompts", [False, True])
@pytest.mark.parametrize("form", ["json", "console"])
async def test_what_was_asked_is_logged_only_where_wanted(log_prompts, form):
    stream = io.StringIO()
    logged_to(stream, format=form, level="debug")
    async with running(log_prompts=log_prompts) as gateway:
        await gateway.chat(text="my secret is 42")
        await gateway.answer("/v1/completions", {"prompt": ["my secret is 43", "and more"]})
        await gateway.answer("/v1/chat/completions", chat_body("my secret is 44", temperature=9))
        await gateway.answer("/v1/chat/completions", chat_body("my secret is 45; refuse me"))
    for number in (42, 43):
        assert (f"my secret is {number}" in stream.getvalue()) is log_prompts
    assert "my secret is 44" not in stream.getvalue()
    assert "my secret is 45" not in stream.getvalue()


def test_the_line_of_an_answer_that_was_cut_off_does_not_say_that_nothing_was_cached_or_drafted():
    tally = Tally(prompt_tokens=[5], num_choices=1)
    tally.add(0, TextDelta(index=0, text="a", token_ids=[1]))
    line = tally.for_log()
    assert (line["prompt_tokens"], line["completion_tokens"]) == (5, 1)
    assert not {"cached_tokens", "draft_tokens", "accepted_tokens"} & set(line)


def test_the_line_for_machines_tells_what_came_of_drafts_and_what_steps_took():
    tally = Tally(prompt_tokens=[5], num_choices=2)
    for choice, depths in enumerate(([2, 0, 3], [1])):
        counts = DraftCounts(
            num_drafts=3, num_draft_tokens=6, num_accepted_tokens=4 - choice, accepted_per_position=[3, 1 - choice]
        )
        metrics = SequenceMetrics(
            queue_time_s=0.0,
            time_to_first_token_s=0.1,
            token_times_s=[0.1, 0.2],
            prompt_tokens=5,
            output_tokens=2,
            cached_tokens=0,
            draft_tokens=6,
            accepted_tokens=4 - choice,
            drafts={"suffix": counts},
            depths=depths,
            step_time=StepSeconds(draft_s=0.001, verify_s=0.2 + choice, sample_s=0.01),
        )
        tally.add(choice, TextDelta(index=choice, text="", token_ids=[1, 2], finish_reason="stop", metrics=metrics))
    line = tally.for_log()
    assert line["drafters"] == {"suffix": {"drafted": 12, "accepted": 7, "accepted_per_position": [6, 1]}}
    assert line["depths"] == [3, 0, 3]
    assert (line["draft_ms"], line["verify_ms"], line["sample_ms"]) == (1.0, 1200.0, 10.0)
    plain = Tally(prompt_tokens=[5], num_choices=1).for_log()
    assert not {"drafters", "depths", "draft_ms"} & plain.keys()
