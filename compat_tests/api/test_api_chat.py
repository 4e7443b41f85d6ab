"""`/v1/chat/completions`: bodies and streams, field by field, as clients read them."""

import json

import pytest
from conftest import chat_body, running
from fake_service import ANSWER, FakeService, logprobs_of

from helix_gateway.service.api import TextDelta

CHAT = "/v1/chat/completions"


async def chunks_of(gateway, **fields):
    *events, last = await gateway.stream(CHAT, chat_body(**fields))
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


async def test_an_answer_has_every_field_that_clients_read(gateway):
    body = await gateway.chat()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "tiny"
    assert body["system_fingerprint"]
    assert isinstance(body["created"], int)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER, "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    tokens = len(ANSWER.encode())
    assert body["usage"] == {
        "prompt_tokens": 20,
        "completion_tokens": tokens,
        "total_tokens": 20 + tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


async def test_a_stream_is_role_then_text_then_one_finish(gateway):
    chunks = await chunks_of(gateway)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [set(choice["delta"]) for choice in choices[1:-1]] == [{"content"}] * (len(choices) - 2)
    assert "".join(choice["delta"]["content"] for choice in choices[:-1]) == ANSWER
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert all(choice["logprobs"] is None for choice in choices)


async def test_every_chunk_of_a_stream_has_the_same_identity(gateway):
    chunks = await chunks_of(gateway)
    for name in ("id", "created", "model", "system_fingerprint", "object"):
        assert len({chunk[name] for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["id"].startswith("chatcmpl-")


async def test_usage_comes_last_and_only_when_asked_for(gateway):
    assert all("usage" not in chunk for chunk in await chunks_of(gateway))
    *chunks, last = await chunks_of(gateway, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(ANSWER.encode())
    assert {"id", "created", "model", "object"} <= set(last)


async def test_choices_interleave_and_each_finishes_once(gateway):
    chunks = await chunks_of(gateway, n=3)
    for index in range(3):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert sum("role" in choice["delta"] for choice in own) == 1
        assert [choice["finish_reason"] for choice in own].count("stop") == 1
        assert "".join(choice["delta"].get("content", "") for choice in own) == ANSWER
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order != sorted(order)


async def test_n_choices_are_one_request_and_all_count(gateway):
    body = await gateway.chat(n=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 3 * len(ANSWER.encode())
    assert body["usage"]["prompt_tokens"] == 20
    assert [call.request.sampling.n for call in gateway.service.calls] == [3]


async def test_logprobs_name_token_bytes_and_alternatives(gateway):
    body = await gateway.chat(logprobs=True, top_logprobs=2, max_tokens=3)
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[byte] for byte in b"Gr\xc3"]
    assert content[0] == {
        "token": "G",
        "logprob": -0.25,
        "bytes": [71],
        "top_logprobs": [
            {"token": "G", "logprob": -0.25, "bytes": [71]},
            {"token": "a", "logprob": -0.75, "bytes": [97]},
        ],
    }
    assert content[2]["token"] == "\\xc3"
    assert body["choices"][0]["logprobs"]["refusal"] is None


async def test_streamed_logprobs_are_those_of_the_body(gateway):
    fields = {"logprobs": True, "top_logprobs": 1}
    chunks = await chunks_of(gateway, **fields)
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == (await gateway.chat(**fields))["choices"][0]["logprobs"]["content"]


async def test_an_impossible_token_has_a_finite_logprob(gateway):
    async def script(call):
        impossible = logprobs_of(65, 0)
        yield TextDelta(
            index=0,
            text="A",
            token_ids=[65],
            logprobs=[type(impossible)(65, float("-inf"), 9, [], [])],
            finish_reason="stop",
        )

    gateway.service.script = script
    body = await gateway.chat(logprobs=True)
    assert body["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


async def test_token_ids_and_prompt_logprobs_come_when_asked_for(gateway):
    body = await gateway.chat(return_token_ids=True, prompt_logprobs=1)
    prompt = list(b"user: Hi\nassistant: ")
    assert body["prompt_token_ids"] == prompt
    assert body["choices"][0]["token_ids"] == list(ANSWER.encode())
    assert body["prompt_logprobs"][0] is None
    assert body["prompt_logprobs"][1] == {
        str(prompt[1]): {"logprob": -0.25, "rank": 1, "decoded_token": chr(prompt[1])}
    }


async def test_streams_tell_token_ids_beside_the_delta_and_never_in_it(gateway):
    chunks = await chunks_of(gateway, return_token_ids=True, prompt_logprobs=0)
    assert chunks[0]["prompt_token_ids"] == list(b"user: Hi\nassistant: ")
    assert chunks[0]["prompt_logprobs"][0] is None
    assert sum("prompt_token_ids" in chunk for chunk in chunks) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [token_id for choice in choices for token_id in choice.get("token_ids", [])] == list(ANSWER.encode())
    assert all(isinstance(value, str) for choice in choices for value in choice["delta"].values())


async def test_a_stop_string_is_named_where_the_answer_stopped_at_one(gateway):
    async def script(call):
        yield TextDelta(index=0, text="A", token_ids=[65], finish_reason="stop", stop_reason="\n\n")

    gateway.service.script = script
    assert (await gateway.chat())["choices"][0]["stop_reason"] == "\n\n"
    assert (await chunks_of(gateway))[-1]["choices"][0]["stop_reason"] == "\n\n"


async def test_tokens_whose_text_is_held_back_send_nothing_yet(gateway):
    async def script(call):
        yield TextDelta(index=0, text="", token_ids=[65])
        yield TextDelta(index=0, text="", token_ids=[66])
        yield TextDelta(index=0, text="AB", token_ids=[67], finish_reason="length")

    gateway.service.script = script
    deltas = [chunk["choices"][0]["delta"] for chunk in await chunks_of(gateway)]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "AB"}, {}]


async def test_line_breaks_of_unicode_do_not_break_events():
    tricky = "a\u2028b\u2029c\x85d\ne\r\nf\x0bg"
    async with running(FakeService(tricky)) as gateway:
        async with gateway.post(CHAT, chat_body(stream=True)) as response:
            text = (await response.read()).decode()
        assert not set(text) & set("\u2028\u2029\x85\r\x0b")
        chunks = await chunks_of(gateway)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == tricky


@pytest.mark.parametrize("content", [[{"type": "text", "text": "Hi"}], [{"type": "text", "text": "H"}] * 2])
async def test_text_parts_are_joined(gateway, content):
    await gateway.chat(messages=[{"role": "user", "content": content}])
    rendered = bytes(gateway.service.calls[-1].request.prompt_token_ids).decode()
    assert rendered == f"user: {''.join(part['text'] for part in content)}\nassistant: "


@pytest.mark.parametrize("message", [{"role": "assistant", "content": None}, {"role": "assistant"}])
async def test_null_content_is_empty(gateway, message):
    await gateway.chat(messages=[{"role": "user", "content": "Hi"}, message])
    assert b"assistant: \nassistant: " in bytes(gateway.service.calls[-1].request.prompt_token_ids)


async def test_an_answer_put_back_into_the_conversation_never_trips(gateway):
    message = (await gateway.chat())["choices"][0]["message"]
    message |= {"tool_calls": None, "function_call": None, "audio": None, "tool_call_id": None, "name": None}
    async with gateway.post(CHAT, chat_body(messages=[{"role": "user", "content": "Hi"}, message])) as response:
        assert response.status == 200
        assert "x-helix-ignored-fields" not in response.headers


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": None, "tool_choice": None},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"store": True, "user": "u", "metadata": {"a": "b"}},
        {"parallel_tool_calls": True, "service_tier": "auto"},
        {"modalities": ["text"]},
        {"stream_options": {"include_usage": True}},
        {"functions": [], "function_call": "none"},
        {"stop": None, "seed": None, "n": None, "temperature": None, "logit_bias": None, "max_tokens": None},
        {"stop": []},
        {"logit_bias": {}},
        {"top_logprobs": 0, "logprobs": False},
        {"top_k": -1, "min_p": 0, "temperature": 0, "top_p": 1},
    ],
    ids=str,
)
async def test_harmless_fields_never_trip_a_request(gateway, fields):
    async with gateway.post(CHAT, chat_body(**fields)) as response:
        assert response.status == 200, await response.text()
        assert "x-helix-ignored-fields" not in response.headers


async def test_unknown_fields_are_accepted_and_named_once(gateway):
    body = chat_body(frobnicate=1, verbosity={"deep": [1] * 10}, gone=None)
    body["messages"] = [{"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}], "mood": "blue"}] * 2
    async with gateway.post(CHAT, body) as response:
        assert response.status == 200
        named = response.headers.getall("x-helix-ignored-fields")
    assert named == ["frobnicate, verbosity, messages[].mood, messages[].content[].cache"]


async def test_names_of_unknown_fields_cannot_forge_headers(gateway):
    async with gateway.post(CHAT, chat_body(**{"a\r\nset-cookie: x": 1, "é" * 500: 1, "z": 2})) as response:
        assert response.status == 200
        assert "set-cookie" not in response.headers
        assert response.headers["x-helix-ignored-fields"].startswith("a__set-cookie__x, ___")


async def test_a_thousand_unknown_fields_still_fit_a_header(gateway):
    async with gateway.post(CHAT, chat_body(**{f"field{index}": 1 for index in range(1000)})) as response:
        assert response.status == 200
        assert len(response.headers["x-helix-ignored-fields"]) < 1100
        assert response.headers["x-helix-ignored-fields"].endswith(" more")


async def test_best_of_returns_the_likeliest_and_counts_all(gateway):
    async def script(call):
        for index, (text, logprob) in enumerate([("bad", -3.0), ("best", -0.1), ("good", -1.0)]):
            token = type(logprobs_of(65, 0))(65, logprob, 1, [], [])
            yield TextDelta(index=index, text=text, token_ids=[65], logprobs=[token], finish_reason="stop")

    gateway.service.script = script
    body = await gateway.chat(n=2, best_of=3)
    assert [choice["message"]["content"] for choice in body["choices"]] == ["best", "good"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 3
    sampling = gateway.service.calls[0].request.sampling
    assert (sampling.n, sampling.logprobs) == (3, 0)
