"""Hostile and broken bodies, up to 10 MB: refused by name, in a tenth of a second, without holding up others."""

import asyncio
import json
import resource
import subprocess
import time

import pytest
from conftest import chat_body, running
from fake_service import FakeService

from compat_tests.slowness import slowness
from helix_gateway.gateway import long_bodies
from helix_gateway.gateway.body import LONG_BYTES

pytestmark = pytest.mark.alone

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MB = 10**6


def chat_raw(content: bytes) -> bytes:
    return b'{"messages": [{"role": "user", "content": ' + content + b"}]}"


TEXT_PART = b'{"type": "text", "text": "a"}, '


def predicted(content: bytes) -> bytes:
    return chat_raw(b'"a"')[:-1] + b', "prediction": {"type": "content", "content": ' + content + b"}}"


def deep(opening: bytes, closing: bytes, depth: int) -> bytes:
    return b'{"messages": ' + opening * depth + closing * depth + b"}"


CASES = {
    "not JSON": (CHAT, b"hello", None, None),
    "empty": (CHAT, b"", None, None),
    "cut off": (CHAT, b'{"messages": [{"role": "us', None, None),
    "an array": (CHAT, b"[1, 2]", None, None),
    "a string": (CHAT, b'"x"', None, None),
    "two documents": (CHAT, b"{}{}", None, None),
    "a byte order mark": (CHAT, b"\xef\xbb\xbf{}", None, None),
    "invalid UTF-8": (CHAT, chat_raw(b'"\xff\xfe"'), "messages", None),
    "UTF-8 of a surrogate": (CHAT, chat_raw(b'"\xed\xa0\x80"'), "messages", None),
    "invalid UTF-8 in a key": (CHAT, b'{"\xff": 1}', None, None),
    "a lone high surrogate": (CHAT, chat_raw(b'"\\ud800"'), None, None),
    "a lone low surrogate": (CHAT, chat_raw(b'"x\\udc00y"'), None, None),
    "a lone surrogate in a stop": (CHAT, b'{"stop": ["\\uD83D"], "messages": []}', None, None),
    "NaN": (CHAT, b'{"temperature": NaN}', None, None),
    "infinite": (CHAT, b'{"temperature": 1e400, "messages": [{"role": "user", "content": "a"}]}', "temperature", None),
    "an endless number": (CHAT, b'{"seed": ' + b"1" * 100_000 + b"}", "seed", None),
    "deep arrays": (CHAT, deep(b"[", b"]", 100_000), None, None),
    "deep objects": (CHAT, deep(b'{"a":', b"}", 0) + b'{"a":' * 100_000, None, None),
    "10 MB of opening brackets": (CHAT, b'{"messages": ' + b"[" * 10 * MB, None, None),
    "no messages": (CHAT, b"{}", "messages", None),
    "empty messages": (CHAT, b'{"messages": []}', "messages", None),
    "wrong role": (CHAT, b'{"messages": [{"role": "wizard", "content": "a"}]}', "messages[0].role", None),
    "no role": (CHAT, b'{"messages": [{"content": "a"}]}', "messages[0].role", None),
    "a number for a message": (CHAT, b'{"messages": [1]}', "messages[0]", None),
    "a tool message": (CHAT, b'{"messages": [{"role": "tool", "content": "a"}]}', "messages[0]", None),
    "an image": (
        CHAT,
        chat_raw(b'[{"type": "image_url", "image_url": {"url": "data:"}}]'),
        "messages[0].content[0]",
        None,
    ),
    "10,000 stop strings": (CHAT, json.dumps(chat_body(stop=["x"] * 10_000)).encode(), "stop", None),
    "a million stop strings": (CHAT, b'{"stop": [' + b'"a",' * MB + b'"a"]}', "stop", None),
    "10 MB of numbers for messages": (CHAT, b'{"messages": [' + b"1," * 5 * MB + b"1]}", "messages[0]", None),
    "10 MB prompt": (CHAT, chat_raw(b'"' + b"word " * 2 * MB + b'"'), "messages", "context_length_exceeded"),
    "10 MB prompt, escaped": (CHAT, chat_raw(b'"' + b"\\n" * 5 * MB + b'"'), "messages", "context_length_exceeded"),
    "10 MB prompt, in a completion": (
        COMPLETIONS,
        b'{"prompt": "' + b"x" * 10 * MB + b'"}',
        "prompt",
        "context_length_exceeded",
    ),
    "10 MB prompt, not ASCII": (
        COMPLETIONS,
        b'{"prompt": "' + "ü".encode() * 5 * MB + b'"}',
        "prompt",
        "context_length_exceeded",
    ),
    "10 MB of token ids": (
        COMPLETIONS,
        b'{"prompt": [' + b"1," * 5 * MB + b"1]}",
        "prompt",
        "context_length_exceeded",
    ),
    "10 MB of arrays of token ids": (COMPLETIONS, b'{"prompt": [' + b"[1]," * 2 * MB + b"[1]]}", "prompt", None),
    "10,000 prompts": (COMPLETIONS, b'{"prompt": [' + b'"a",' * 10_000 + b'"a"]}', "prompt", None),
    "more answers than are ever queued": (
        COMPLETIONS,
        b'{"n": 2, "prompt": [' + b'"a",' * 1023 + b'"a"]}',
        "prompt",
        None,
    ),
    "5 MB prediction": (CHAT, predicted(b'"' + b"word " * MB + b'"'), "prediction", None),
    "5 MB prediction, in parts": (CHAT, predicted(b"[" + TEXT_PART * 150_000 + b"{}]"), "prediction", None),
    "4 MB of numbers for a prediction": (CHAT, predicted(b"[" + b"1," * 2 * MB + b"1]"), "prediction", None),
    "half a surrogate pair in a prediction": (CHAT, predicted(b'"\\ud800"'), None, None),
    "invalid UTF-8 in a prediction": (CHAT, predicted(b'"\xff"'), "prediction", None),
    "no prompt": (COMPLETIONS, b"{}", "prompt", None),
    "no prompts": (COMPLETIONS, b'{"prompt": []}', "prompt", None),
    "an empty prompt of ids": (COMPLETIONS, b'{"prompt": [[1], []]}', "prompt[1]", None),
    "mixed prompts": (COMPLETIONS, b'{"prompt": ["a", [1]]}', "prompt[1]", None),
    "mixed ids": (COMPLETIONS, b'{"prompt": [1, "a"]}', "prompt[1]", None),
    "a boolean among ids": (COMPLETIONS, b'{"prompt": [1, true]}', "prompt[1]", None),
    "a token that there is not": (COMPLETIONS, b'{"prompt": [1, 258]}', "prompt[1]", None),
    "a negative token": (COMPLETIONS, b'{"prompt": [[1], [-1]]}', "prompt[1][0]", None),
    "a number for a prompt": (COMPLETIONS, b'{"prompt": 5}', "prompt", None),
    "an object for a prompt": (COMPLETIONS, b'{"prompt": {"a": 1}}', "prompt", None),
}


LIMIT_S = 0.1
"""Processor time of server and client together, for the best of some tries: machines that run tests are busy."""
TRIES = 5


def processor_time_s():
    """Used so far by this process and by those that it started and that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


@pytest.fixture(scope="module")
def start_s():
    """What a process for long bodies uses before the body comes: it waits already, unless the body is the first."""
    costs = []
    for _ in range(3):
        before = processor_time_s()
        subprocess.run(long_bodies._COMMAND, input=b"", check=True)
        costs.append(processor_time_s() - before)
    return min(costs)


@pytest.mark.parametrize("path, body, param, code", CASES.values(), ids=CASES.keys())
async def test_bad_bodies_are_refused_by_name_in_a_tenth_of_a_second(gateway, start_s, path, body, param, code):
    times = []
    limit_s = LIMIT_S * slowness() + (start_s if len(body) > LONG_BYTES else 0.0)
    for _ in range(TRIES):
        started = processor_time_s()
        status, answer = await gateway.answer(path, body)
        times.append(processor_time_s() - started)
        error = answer["error"]
        assert status == 400
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
        assert len(error["message"]) < 500
        if times[-1] < limit_s:
            break
    assert min(times) < limit_s
    assert gateway.service.calls == []


async def test_megabytes_of_unknown_fields_cost_nothing(gateway):
    junk = b'{"messages": [{"role": "user", "content": "a"}], "junk": [' + b"{}," * 3 * MB + b"{}]}"
    started = processor_time_s()
    async with gateway.post(CHAT, junk) as response:
        assert response.status == 200
        assert response.headers["x-helix-ignored-fields"] == "junk"
    assert processor_time_s() - started < 0.5


async def test_a_key_given_twice_counts_once(gateway):
    body = await gateway.answer(
        CHAT, b'{"max_tokens": 1, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}'
    )
    assert body[1]["usage"]["completion_tokens"] == 2


async def test_a_prompt_far_too_long_is_never_tokenised_whole():
    service = FakeService(max_model_len=1000)
    service.tokenizer.least_tokens = lambda text: 1  # as if tokens could be of any length
    async with running(service) as gateway:
        status, body = await gateway.answer(COMPLETIONS, {"prompt": "ab " * (MB // 5)})
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        assert "at least" in body["error"]["message"]
        assert service.tokenizer.encoded_characters < 10_000


async def test_others_are_served_while_a_long_prompt_is_read(gateway):
    big = chat_raw(b'"' + b"word " * 2 * MB + b'"')

    async def send_big():
        for _ in range(3):
            assert (await gateway.answer(CHAT, big))[0] == 400

    sending = asyncio.create_task(send_big())
    waits = []
    while not sending.done():
        started = time.perf_counter()
        async with gateway.get("/health") as response:
            await response.read()
        waits.append(time.perf_counter() - started)
    await sending
    assert sorted(waits)[len(waits) // 2] < 0.05
