"""Wire options become the engine's, and every bound is refused by name on both sides of it."""

import math

import pytest
from conftest import chat_body, running
from fake_service import FakeService

from helix_gateway.core.request import SamplingParams
from helix_gateway.service.api import StopStrings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


async def sampling_of(gateway, **fields):
    await gateway.chat(**fields)
    return gateway.service.calls[-1].request.sampling


async def test_defaults_are_openais(gateway):
    room = 512 - 20
    assert await sampling_of(gateway) == SamplingParams(max_tokens=room, seed=2**64 - 5)


async def test_every_option_arrives(gateway):
    fields = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "logit_bias": {"97": 1, "98": -100},
        "min_tokens": 3,
        "max_tokens": 9,
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "seed": 42,
        "logprobs": True,
        "top_logprobs": 4,
        "prompt_logprobs": 5,
        "n": 2,
    }
    assert await sampling_of(gateway, **fields) == SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias={97: 1.0, 98: -100.0},
        min_tokens=3,
        max_tokens=9,
        stop_token_ids=(1, 2),
        ignore_eos=True,
        seed=42,
        logprobs=4,
        prompt_logprobs=5,
        n=2,
    )


async def test_stops_and_the_rest_of_the_request_arrive(gateway):
    await gateway.chat(
        stop="END",
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        priority=-3,
        cache_salt="s",
        speculation=2,
    )
    call = gateway.service.calls[-1]
    assert call.stop == StopStrings(strings=("END",), include_in_output=True, skip_special_tokens=False)
    assert (call.request.priority, call.request.cache_salt, call.request.max_depth) == (-3, "s", 2)


@pytest.mark.parametrize("speculation, depth", [("off", 0), (0, 0), (5, 5), (None, None), ("on", None), ("auto", None)])
async def test_speculation_is_off_a_depth_or_as_the_server_decides(gateway, speculation, depth):
    await gateway.chat(speculation=speculation)
    assert gateway.service.calls[-1].request.max_depth == depth


async def test_a_wrong_speculation_is_told_all_that_is_right(gateway):
    status, answer = await gateway.answer(CHAT, chat_body(speculation="ON"))
    assert (status, answer["error"]["param"]) == (400, "speculation")
    assert all(word in answer["error"]["message"] for word in ('"off"', '"on"', '"auto"', "0 to 64"))


async def test_bad_words_are_banned_at_the_start_and_after_a_space(gateway):
    sampling = await sampling_of(gateway, bad_words=["ab", " c"])
    assert set(sampling.bad_words) == {(97, 98), (32, 97, 98), (32, 99)}


@pytest.mark.parametrize("top_k", [0, -1, None])
async def test_top_k_of_nothing_is_no_top_k(gateway, top_k):
    assert (await sampling_of(gateway, top_k=top_k)).top_k is None


async def test_a_seed_is_drawn_and_told_or_taken_as_it_is(gateway):
    async with gateway.post(CHAT, chat_body()) as response:
        assert response.headers["x-helix-seed"] == str(2**64 - 5)
    async with gateway.post(CHAT, chat_body(seed=7)) as response:
        assert response.headers["x-helix-seed"] == "7"
    assert (await sampling_of(gateway, seed=-1)).seed == 2**64 - 1
    assert (await sampling_of(gateway, seed=-(2**63))).seed == 2**63


async def test_max_completion_tokens_goes_before_max_tokens(gateway):
    assert (await sampling_of(gateway, max_completion_tokens=5)).max_tokens == 5
    assert (await sampling_of(gateway, max_completion_tokens=5, max_tokens=4)).max_tokens == 5


async def test_a_max_tokens_that_is_overruled_is_named(gateway):
    for other, ignored in ((4, "max_tokens"), (5, None)):
        async with gateway.post(CHAT, chat_body(max_completion_tokens=5, max_tokens=other)) as response:
            assert response.headers.get("x-helix-ignored-fields") == ignored


async def test_more_tokens_than_fit_are_clamped_and_said():
    async with running(FakeService("x" * 100, max_model_len=30)) as gateway:
        async with gateway.post(CHAT, chat_body(max_tokens=4096, min_tokens=50)) as response:
            assert response.status == 200
            assert response.headers["x-helix-clamped"] == "max_tokens=10"
            assert (await response.json())["choices"][0]["finish_reason"] == "length"
        sampling = gateway.service.calls[-1].request.sampling
        assert (sampling.max_tokens, sampling.min_tokens) == (10, 10)
        async with gateway.post(CHAT, chat_body(max_tokens=10)) as response:
            assert "x-helix-clamped" not in response.headers


async def test_the_operators_default_bounds_chats_that_name_no_limit():
    async with running(default_max_tokens=6) as gateway:
        async with gateway.post(CHAT, chat_body()) as response:
            assert "x-helix-clamped" not in response.headers
        assert gateway.service.calls[-1].request.sampling.max_tokens == 6
        assert (await sampling_of(gateway, max_tokens=8)).max_tokens == 8


TEXT_PART = {"type": "text", "text": "Grüße"}


def predicted(content):
    return {"type": "content", "content": content}


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", ""),
        ([], ""),
        ("Grüße <|im_end|>", "Grüße <|im_end|>"),
        ([TEXT_PART, {"type": "text", "text": "!"}], "Grüße!"),
    ],
)
async def test_a_prediction_arrives_as_the_tokens_of_its_text(gateway, content, expected):
    body = await gateway.chat(prediction=predicted(content))
    assert bytes(gateway.service.calls[-1].request.prediction_token_ids).decode() == expected
    details = body["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == details["rejected_prediction_tokens"] == 0


async def test_a_prediction_goes_with_every_prompt_of_every_route(gateway):
    for path, body, calls in (
        (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 5}, 2),
        ("/generate", {"prompt": "a", "max_tokens": 5}, 1),
        ("/generate/stream", {"prompt": "a", "max_tokens": 5}, 1),
    ):
        async with gateway.post(path, {**body, "prediction": predicted("Grüße")}) as response:
            assert response.status == 200, await response.text()
            assert "x-helix-ignored-fields" not in response.headers
            await response.read()
        got = [bytes(call.request.prediction_token_ids).decode() for call in gateway.service.calls[-calls:]]
        assert got == ["Grüße"] * calls


@pytest.mark.parametrize("parts", [1, 12])
async def test_of_a_long_prediction_what_the_context_holds_is_taken(gateway, parts):
    text = "words " * (1_000_000 // 6 // parts)
    content = text if parts == 1 else [{"type": "text", "text": text}] * parts
    status, body = await gateway.answer(CHAT, chat_body(prediction=predicted(content)))
    assert status == 200, body
    assert bytes(gateway.service.calls[-1].request.prediction_token_ids).decode() == text[:512]
    assert gateway.service.tokenizer.encoded_characters < 20_000


BOTH = [
    ("temperature", [0, 2, 0.7], [-0.1, 2.1, "0.5", True, []]),
    ("top_p", [1, 0.001], [0, 1.1, -1, "1"]),
    ("min_p", [0, 1], [-0.1, 1.1]),
    ("top_k", [0, -1, 50], [-2, 1.5, "5"]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("repetition_penalty", [0.1, 10], [0, -1, 10.1]),
    ("n", [1, 128, 1.0], [0, 129, 1.5, "1", True]),
    ("best_of", [1, 128], [0, 129]),
    ("prompt_logprobs", [0, 20], [-1, 21]),
    ("seed", [-(2**63), 2**64 - 1, 0], [-(2**63) - 1, 2**64, 0.5, "1"]),
    ("min_tokens", [0, 3], [-1, "0"]),
    ("stop", ["a", ["a"] * 64, "a" * 1024], ["", [""], ["a"] * 65, "a" * 1025, 5, [5], {"a": 1}]),
    ("stop_token_ids", [[0, 257]], [[258], [-1], ["1"], 5]),
    ("bad_words", ["a", ["a", "b"]], [[""], [1], 5]),
    ("logit_bias", [{"0": 100, "257": -100}], [{"258": 1}, {"x": 1}, {"-1": 1}, {"0": 101}, {"0": "1"}, [], {"٣": 1}]),
    ("ignore_eos", [True, False], [1, "true"]),
    ("skip_special_tokens", [True, False], [0]),
    ("include_stop_str_in_output", [True, False], ["no"]),
    ("return_token_ids", [True, False], [1]),
    ("priority", [-5, 5], [1.5, 2**31]),
    ("cache_salt", ["x"], [5, "x" * 1025]),
    (
        "speculation",
        ["off", "on", "auto", 0, 8, 64],
        ["ON", "OFF", "", "8", -1, 65, 2**70, 1.5, True, False, [], [8], {}, {"depth": 8}],
    ),
    ("stream", [False], ["yes", 1]),
    ("stream_options", [{}], [5, {"include_usage": 1}]),
    ("response_format", [{"type": "text"}], [{"type": "json_object"}, {"type": "xml"}, {}, "text"]),
    ("model", ["tiny", ""], [5]),
    (
        "prediction",
        [
            None,
            predicted(""),
            predicted("Grüße, 🌍! <|im_end|> \0"),
            predicted([]),
            predicted([TEXT_PART, {"type": "text", "text": ""}, {"type": "refusal", "refusal": "No."}]),
        ],
        [
            "Grüße",
            5,
            True,
            [],
            [predicted("a")],
            {},
            {"content": "a"},
            {"type": "content"},
            {"type": "text", "content": "a"},
            {"type": "content", "content": None},
            predicted(5),
            predicted(True),
            predicted({"text": "a"}),
            predicted(["a"]),
            predicted([5]),
            predicted([{"text": "a"}]),
            predicted([{"type": "text", "text": 5}]),
            predicted([TEXT_PART, {"type": "image_url", "image_url": {"url": "data:"}}]),
            predicted([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]),
            predicted([TEXT_PART] * 100_000),
        ],
    ),
]
CHAT_ONLY = [
    ("max_tokens", [1, 10**9, 2**70], [0, -1, 1.5, "5"]),
    ("max_completion_tokens", [1], [0]),
    ("logprobs", [True, False], [1, "yes"]),
    ("tools", [[]], [[{"type": "function"}], {}, "x"]),
    ("tool_choice", ["none", "auto"], ["required", {"type": "function"}]),
    ("functions", [[]], [[{}]]),
    ("modalities", [["text"]], [["text", "audio"], ["audio"], "text"]),
    ("audio", [], [{"voice": "alloy"}]),
]
COMPLETIONS_ONLY = [
    ("max_tokens", [1, 10**9], [0, -1]),
    ("logprobs", [0, 20], [-1, 21, True]),
    ("echo", [True], [1]),
    ("suffix", [""], ["x", 5]),
]


def cases(path, table, column):
    return [(path, row[0], value) for row in table for value in row[column]]


def body_for(path, name, value):
    body = {"prompt": "a", "max_tokens": 5} if path == COMPLETIONS else chat_body(max_tokens=5)
    return {**body, name: value, **({"n": 1} if name == "best_of" else {})}


def every(column):
    tables = [(CHAT, BOTH + CHAT_ONLY), (COMPLETIONS, BOTH + COMPLETIONS_ONLY)]
    return [case for path, table in tables for case in cases(path, table, column)]


async def test_values_at_the_bounds_are_taken(gateway):
    for path, name, value in every(1):
        status, body = await gateway.answer(path, body_for(path, name, value))
        assert status == 200, (name, value, body)


async def test_values_beyond_the_bounds_are_refused_by_name(gateway):
    for path, name, value in every(2):
        status, body = await gateway.answer(path, body_for(path, name, value))
        assert status == 400, (name, value, body)
        error = body["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"].startswith(name), (name, value, error)
        assert f"`{error['param']}`" in error["message"]
    assert gateway.service.calls == []


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"logit_bias": {str(index): 1 for index in range(1025)}}, "logit_bias"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_fields_that_contradict_each_other_are_refused(gateway, fields, param):
    status, body = await gateway.answer(CHAT, chat_body(**fields))
    assert (status, body["error"]["param"]) == (400, param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
async def test_numbers_that_are_no_numbers_are_refused(gateway, number):
    raw = b'{"messages": [{"role": "user", "content": "a"}], "temperature": %b}' % number.encode()
    status, body = await gateway.answer(CHAT, raw)
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert math.isinf(1e999)


async def test_messages_name_the_bound(gateway):
    _, body = await gateway.answer(CHAT, chat_body(temperature=2.5))
    assert body["error"]["message"] == "`temperature` must be at most 2, not 2.5."
    _, body = await gateway.answer(CHAT, chat_body(seed=2**64))
    assert str(2**64 - 1) in body["error"]["message"]
