"""Long bodies are read in a process of their own, and say the same as short ones do."""

import asyncio
import json
import signal
import subprocess
import sys

import msgspec
import pytest
import structlog
from conftest import chat_body, running, until
from fake_service import FakeService

from helix_gateway.core.errors import EngineUnavailableError
from helix_gateway.gateway import long_bodies
from helix_gateway.gateway.body import LONG_BYTES
from helix_gateway.gateway.envelope import Envelope, JsonError, Overlong, Wanted, read_envelope
from helix_gateway.gateway.envelope_process import LENGTH_BYTES, Contents
from helix_gateway.gateway.long_bodies import LongBodies

pytestmark = pytest.mark.alone

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PADDING = "x" * LONG_BYTES


@pytest.fixture
async def reader():
    bodies = LongBodies()
    yield bodies
    await bodies.close()


def padded(body):
    """The same request, too long to be read here."""
    return json.dumps({**body, "padding": PADDING}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1, "b": null, "c": [1, {"d": "\\u00e9"}], "a": 2}',
        b"{}",
        b"",
        b"[1]",
        b'{"a": ',
        b'{"a": "\xff"}',
        b'{"a": ' + b"[" * 100_000,
        b'{"a": "\\ud800"}',
    ],
)
async def test_it_says_what_reading_here_says(reader, data):
    wanted = Wanted(fields=["a", "c"])
    try:
        here = read_envelope(data, wanted)
    except JsonError as error:
        here = str(error)
    try:
        there = await reader.read([data[:3], data[3:]], wanted)
    except JsonError as error:
        there = str(error)
    assert there == here


async def test_megabytes_come_back_as_they_were_sent(reader):
    text, numbers = b'"' + b"x\xc3\xa9" * 1_000_000 + b'"', b"[" + b"1," * 1_000_000 + b"1]"
    data = b'{"c": %b, "b": null, "short": "", "d": 1, "a": %b}' % (numbers, text)
    opened = await reader.read([data[:70_000], data[70_000:]], Wanted(fields=["a", "c", "short"]))
    assert list(opened.fields.items()) == [("c", numbers), ("short", b'""'), ("a", text)]
    assert opened.others == ["d"]


@pytest.mark.parametrize(
    "value, is_long",
    [('"12345678"', True), ('["12345678"]', False), ("[1, 2, 3, 4]", True), ("[[1, 2, 3]]", False), ('"1234"', False)],
)
def test_only_one_prompt_is_bounded_and_not_several(value, is_long):
    wanted = Wanted(fields=["prompt"], bounded="prompt", opening=r'"|\[\s*[-\d]', limit_bytes=8)
    opened = read_envelope(f'{{"other": "{PADDING}", "prompt": {value}}}'.encode(), wanted)
    assert isinstance(opened, Overlong if is_long else Envelope)


async def test_a_long_body_is_answered_as_the_short_one_is():
    async with running(FakeService()) as gateway:
        status, answer = await gateway.answer(CHAT, padded(chat_body(seed=1)))
        assert status == 200
        assert answer["choices"] == (await gateway.chat(seed=1))["choices"]


async def test_unknown_fields_of_a_long_body_are_named():
    async with running(FakeService()) as gateway, gateway.post(CHAT, padded(chat_body())) as response:
        assert response.headers["x-helix-ignored-fields"] == "padding"


async def test_a_thousand_prompts_of_numbers_are_a_thousand_prompts():
    prompts = [[number % 7 + 1] * 300 for number in range(1000)]
    async with running(FakeService(max_model_len=8192)) as gateway:
        status, answer = await gateway.answer(COMPLETIONS, padded({"prompt": prompts, "max_tokens": 1}))
    assert status == 200
    assert len(answer["choices"]) == 1000
    assert answer["usage"]["prompt_tokens"] == 300_000


@pytest.mark.parametrize(
    "prompts, path",
    [
        ("[[1], [2, true]]", "prompt[1][1]"),
        ("[[1], [2, [3]]]", "prompt[1][1]"),
        ("[[1], 2]", "prompt[1]"),
        ("[[1], null, [2]]", "prompt[1]"),
        ("[[1], []]", "prompt[1]"),
    ],
)
async def test_what_is_wrong_among_prompts_of_numbers_is_named(prompts, path):
    async with running(FakeService()) as gateway:
        status, answer = await gateway.answer(COMPLETIONS, f'{{"prompt": {prompts}}}'.encode())
    assert (status, answer["error"]["param"]) == (400, path)


async def test_a_client_that_leaves_takes_its_process_with_it(reader, monkeypatch):
    started = asyncio.get_running_loop().create_future()
    start = long_bodies._start

    async def watched():
        process = await start()
        started.set_result(process)
        return process

    monkeypatch.setattr(long_bodies, "_start", watched)
    reading = asyncio.create_task(reader.read([b"["] * 100_000, Wanted(fields=[])))
    process = await started
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert process.returncode is not None


async def test_a_machine_without_room_for_a_process_is_a_503_that_says_when_to_come_again(monkeypatch):
    monkeypatch.setattr(long_bodies, "_COMMAND", ("/nowhere/python",))
    async with running(FakeService()) as gateway, gateway.post(CHAT, padded(chat_body())) as response:
        assert response.status == 503
        assert "Retry-After" in response.headers


@pytest.mark.parametrize("cut", [0, 3, LENGTH_BYTES, LENGTH_BYTES + 2, -1], ids=str)
async def test_a_process_that_dies_answering_gives_no_answer(reader, monkeypatch, cut):
    head = msgspec.msgpack.encode(Contents({"a": 3}, []))
    answer = (len(head).to_bytes(LENGTH_BYTES, "big") + head + b"123")[:cut]
    script = f"import sys; sys.stdin.buffer.read(); sys.stdout.buffer.write({answer!r})"
    monkeypatch.setattr(long_bodies, "_COMMAND", (sys.executable, "-c", script))
    with pytest.raises(EngineUnavailableError):
        await reader.read([b'{"a": 123}'], Wanted(fields=["a"]))


async def test_a_process_that_dies_waiting_is_replaced(reader):
    wanted = Wanted(fields=["a"])
    await reader.read([b'{"a": 1}'], wanted)
    await until(lambda: reader._spare)
    reader._spare.kill()
    await reader._spare.wait()
    assert await reader.read([b'{"a": 2}'], wanted) == Envelope({"a": b"2"}, [])


async def test_none_is_left_behind():
    reader = LongBodies()
    await reader.read([b'{"a": 1}'], Wanted(fields=["a"]))
    await until(lambda: reader._spare)
    spare = reader._spare
    await reader.close()
    assert spare.returncode == 0


async def test_bodies_that_end_together_leave_one_process_and_wait_for_none(monkeypatch):
    reader, wanted = LongBodies(), Wanted(fields=["a"])
    start, asked, started, may_start = long_bodies._start, [], [], asyncio.Event()

    async def held():
        asked.append(len(asked))
        if len(asked) > 2:
            await may_start.wait()
        started.append(await start())
        return started[-1]

    monkeypatch.setattr(long_bodies, "_start", held)
    both = asyncio.gather(reader.read([b'{"a": 1}'], wanted), reader.read([b'{"a": 2}'], wanted))
    answers = await asyncio.wait_for(both, 30)
    assert answers == [Envelope({"a": b"1"}, []), Envelope({"a": b"2"}, [])]
    asyncio.get_running_loop().call_later(0.05, may_start.set)
    await reader.close()
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(asked) == 3


async def test_a_body_is_answered_though_no_process_can_be_started_for_the_next(reader, monkeypatch):
    await reader.read([b"{}"], Wanted(fields=[]))
    await until(lambda: reader._spare)
    monkeypatch.setattr(long_bodies, "_COMMAND", ("/nowhere/python",))
    with structlog.testing.capture_logs() as lines:
        assert await reader.read([b'{"a": 1}'], Wanted(fields=["a"])) == Envelope({"a": b"1"}, [])
        await until(lambda: lines)
    assert [(line["log_level"], "/nowhere/python" in line["error"]) for line in lines] == [("warning", True)]


def test_signals_to_the_whole_group_leave_a_body_in_flight_alone():
    process = subprocess.Popen(
        long_bodies._COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    # More than a pipe holds: once that is written, it reads.
    process.stdin.write(msgspec.json.encode(Wanted(fields=["a"])) + b'\n{"junk": "' + b"x" * 1_000_000)
    process.stdin.flush()
    for name in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(name)
    answer, errors = process.communicate(b'", "a": 123}', timeout=30)
    assert (process.returncode, errors) == (0, b"")
    assert answer.endswith(b"123")


def test_a_waiting_process_ends_without_a_word_when_its_parent_does():
    process = subprocess.run(long_bodies._COMMAND, input=b"", capture_output=True, check=True, timeout=30)
    assert (process.stdout, process.stderr) == (b"", b"")
