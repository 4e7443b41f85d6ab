"""`/v1/completions`: forms of prompts, echo, the legacy logprobs, several prompts at once."""

import json

import pytest
from conftest import running
from fake_service import ANSWER, BOS, FakeService

COMPLETIONS = "/v1/completions"


async def complete(gateway, prompt, **fields):
    status, body = await gateway.answer(COMPLETIONS, {"model": "tiny", "prompt": prompt, **fields})
    assert status == 200, body
    return body


async def chunks_of(gateway, prompt, **fields):
    *events, last = await gateway.stream(COMPLETIONS, {"model": "tiny", "prompt": prompt, **fields})
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


async def test_an_answer_has_every_field_that_clients_read(gateway):
    body = await complete(gateway, "ab")
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["system_fingerprint"]


async def test_sixteen_tokens_unless_more_are_asked_for():
    async with running(FakeService("x" * 40)) as gateway:
        body = await complete(gateway, "ab")
        assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("x" * 16, "length")
        assert (await complete(gateway, "ab", max_tokens=30))["choices"][0]["text"] == "x" * 30


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("ab", [[BOS, 97, 98]]),
        (["ab", "c"], [[BOS, 97, 98], [BOS, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        ("", [[BOS]]),
    ],
    ids=str,
)
async def test_every_form_of_prompt_reaches_the_engine(gateway, prompt, expected):
    await complete(gateway, prompt)
    assert [call.request.prompt_token_ids for call in gateway.service.calls] == expected


async def test_special_tokens_can_be_left_out(gateway):
    await complete(gateway, "ab", add_special_tokens=False)
    assert gateway.service.calls[0].request.prompt_token_ids == [97, 98]


async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(gateway):
    body = await complete(gateway, ["a", "b", "c"], n=2, echo=True)
    assert [(choice["index"], choice["text"][0]) for choice in body["choices"]] == list(enumerate("aabbcc"))
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 6 * len(ANSWER.encode())
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 6


async def test_several_prompts_interleave_in_one_stream():
    async with running(FakeService("xyz", token_s=0.001)) as gateway:
        chunks = await chunks_of(gateway, ["a", "b"], n=2, echo=True, stream_options={"include_usage": True})
    *chunks, last = chunks
    texts = ["", "", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["axyz", "axyz", "bxyz", "bxyz"]
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order != sorted(order)
    assert last["usage"]["total_tokens"] == 4 + 12
    assert sum(chunk["choices"][0]["finish_reason"] == "stop" for chunk in chunks) == 4


async def test_each_prompt_has_its_own_seed_and_the_first_is_told(gateway):
    async with gateway.post(COMPLETIONS, {"prompt": ["a", "a", "a"], "seed": 2**64 - 2}) as response:
        assert response.headers["x-helix-seed"] == str(2**64 - 2)
    assert [call.request.sampling.seed for call in gateway.service.calls] == [2**64 - 2, 2**64 - 1, 0]
    assert len({call.request.request_id for call in gateway.service.calls}) == 3


async def test_legacy_logprobs_are_parallel_lists_with_offsets_into_the_text(gateway):
    body = await complete(gateway, "ab", logprobs=1, max_tokens=4)
    choice = body["choices"][0]
    assert choice["text"] == "Grü"
    assert choice["logprobs"] == {
        "tokens": ["G", "r", "bytes:\\xc3", "bytes:\\xbc"],
        "token_logprobs": [-0.25] * 4,
        "top_logprobs": [{"G": -0.25}, {"r": -0.25}, {"bytes:\\xc3": -0.25}, {"bytes:\\xbc": -0.25}],
        "text_offset": [0, 1, 2, 2],
    }


async def test_logprobs_of_zero_tell_the_chosen_token_alone(gateway):
    body = await complete(gateway, "ab", logprobs=0, max_tokens=1)
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"G": -0.25}]


async def test_echo_gives_the_prompt_back_with_its_logprobs(gateway):
    body = await complete(gateway, "ü", echo=True, logprobs=2, max_tokens=1)
    choice = body["choices"][0]
    assert choice["text"] == "üG"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<s>", "bytes:\\xc3", "bytes:\\xbc", "G"]
    assert logprobs["token_logprobs"] == [None, -0.25, -0.25, -0.25]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 0, 0, 1]


async def test_echo_of_token_ids_is_their_text(gateway):
    body = await complete(gateway, [97, 98], echo=True, logprobs=0, max_tokens=1)
    assert body["choices"][0]["text"] == "abG"
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2]


async def test_only_the_prompt_is_scored_where_no_tokens_are_asked_for(gateway):
    body = await complete(gateway, "ab", echo=True, logprobs=1, max_tokens=0)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "b"]
    assert body["usage"]["completion_tokens"] == 0
    chunks = await chunks_of(gateway, "ab", echo=True, logprobs=1, max_tokens=0)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "ab"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("fields", [{"logprobs": 2}, {"logprobs": 2, "echo": True}, {"echo": True}], ids=str)
async def test_a_stream_adds_up_to_the_body(gateway, fields):
    whole = (await complete(gateway, ["ab", "ü"], n=2, max_tokens=5, **fields))["choices"]
    texts, logprobs = {}, {}
    for chunk in await chunks_of(gateway, ["ab", "ü"], n=2, max_tokens=5, **fields):
        choice = chunk["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            logprobs.setdefault(choice["index"], {}).setdefault(name, []).extend(values)
    for choice in whole:
        assert texts[choice["index"]] == choice["text"]
        assert logprobs.get(choice["index"]) == choice["logprobs"]


async def test_prompt_logprobs_and_token_ids_stand_in_the_choice(gateway):
    body = await complete(gateway, [[BOS, 97, 98], [97]], prompt_logprobs=1, return_token_ids=True, max_tokens=1, n=2)
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[BOS, 97, 98]] * 2 + [[97]] * 2
    assert [choice["token_ids"] for choice in body["choices"]] == [[71]] * 4
    assert [len(choice["prompt_logprobs"]) for choice in body["choices"]] == [3, 3, 1, 1]
    assert body["choices"][0]["prompt_logprobs"][1] == {"97": {"logprob": -0.25, "rank": 1, "decoded_token": "a"}}


async def test_prompt_logprobs_come_first_even_if_another_choice_spoke_first(gateway):
    answer = gateway.service._answer

    async def script(call):
        deltas = [delta async for delta in answer(call)]
        for delta in deltas[1:2] + deltas[:1] + deltas[2:]:
            yield delta

    gateway.service.script = script
    chunks = await chunks_of(gateway, "ab", n=2, echo=True, logprobs=1, max_tokens=2)
    first = {}
    for chunk in chunks:
        first.setdefault(chunk["choices"][0]["index"], chunk["choices"][0])
    assert [first[index]["text"] for index in (0, 1)] == ["ab", "ab"]
    assert all(len(choice["logprobs"]["tokens"]) == 3 for choice in first.values())


async def test_one_of_several_prompts_that_fails_ends_them_all(gateway):
    from helix_gateway.core.errors import QueueFullError

    answer = gateway.service._answer

    async def script(call):
        if call.request.prompt_token_ids[-1] == 98:
            raise QueueFullError("The queue is full.", retry_after_s=1.5)
        async for delta in answer(call):
            yield delta

    gateway.service.script = script
    status, body = await gateway.answer(COMPLETIONS, {"prompt": ["a", "b", "c"]})
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert gateway.service.open == 0
