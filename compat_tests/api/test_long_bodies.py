"""Long bodies are read in a process of their own, and say the same as short ones do."""

import asyncio
import json

import pytest
from conftest import chat_body, running
from fake_service import FakeService

from helix_gateway.gateway import long_bodies
from helix_gateway.gateway.body import LONG_BYTES
from helix_gateway.gateway.envelope import Envelope, JsonError, Overlong, Wanted, read_envelope
from helix_gateway.gateway.long_bodies import LongBodies

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


async def test_a_process_that_dies_waiting_is_replaced(reader):
    wanted = Wanted(fields=["a"])
    await reader.read([b'{"a": 1}'], wanted)
    reader._spare.kill()
    await reader._spare.wait()
    assert await reader.read([b'{"a": 2}'], wanted) == Envelope({"a": b"2"}, [])


async def test_none_is_left_behind():
    reader = LongBodies()
    await reader.read([b'{"a": 1}'], Wanted(fields=["a"]))
    spare = reader._spare
    await reader.close()
    assert spare.returncode == 0
