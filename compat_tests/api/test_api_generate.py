"""`/generate` and `/generate/stream`: their own shape, through the machinery of the other routes."""

import asyncio
import json

import pytest
from conftest import running, until
from fake_service import ANSWER, FakeService

from helix_gateway.core.errors import QueueFullError
from helix_gateway.core.event import SequenceMetrics
from helix_gateway.service.api import TextDelta

BODY = {"prompt": "Hi", "max_tokens": 100}


async def test_an_answer_is_text_tokens_and_figures(gateway):
    status, body = await gateway.answer("/generate", BODY)
    assert status == 200
    assert body.pop("id").startswith("gen-")
    metrics = body.pop("metrics")
    assert body == {
        "model": "tiny",
        "text": ANSWER,
        "token_ids": list(ANSWER.encode()),
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert (metrics["prompt_tokens"], metrics["completion_tokens"], metrics["cached_tokens"]) == (3, 14, 3)
    assert metrics["time_to_first_token_s"] == 0.01


async def test_a_stream_has_an_event_for_each_accept_and_its_figures_at_the_end(gateway):
    *events, done = await gateway.stream("/generate/stream", BODY)
    assert done == "[DONE]"
    events = [json.loads(event) for event in events]
    assert "".join(event["text"] for event in events) == ANSWER
    assert [event["token_ids"] for event in events] == [[token] for token in ANSWER.encode()]
    assert [event["finish_reason"] for event in events] == [None] * 13 + ["stop"]
    assert ["metrics" in event for event in events] == [False] * 13 + [True]
    assert len({event["id"] for event in events}) == 1
    assert events[-1]["metrics"]["completion_tokens"] == 14


async def test_generate_streams_too_where_the_body_asks(gateway):
    events = await gateway.stream("/generate", BODY)
    assert (events[-1], len(events)) == ("[DONE]", 15)


async def test_the_rate_counts_what_came_after_the_first_step():
    async def script(call):
        yield TextDelta(
            index=0,
            text="abcd",
            token_ids=[97, 98, 99, 100],
            finish_reason="length",
            metrics=SequenceMetrics(
                queue_time_s=0.25,
                time_to_first_token_s=1.0,
                token_times_s=[1.0, 1.0, 1.5, 3.0],
                prompt_tokens=2,
                output_tokens=4,
                cached_tokens=0,
                num_preemptions=1,
                draft_tokens=7,
                accepted_tokens=2,
            ),
        )

    async with running() as gateway:
        gateway.service.script = script
        _, body = await gateway.answer("/generate", BODY)
    assert body["finish_reason"] == "length"
    assert body["metrics"] == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "cached_tokens": 0,
        "draft_tokens": 7,
        "accepted_tokens": 2,
        "preemptions": 1,
        "queue_time_s": 0.25,
        "time_to_first_token_s": 1.0,
        "generation_time_s": 3.0,
        "tokens_per_second": 1.0,
    }


async def test_options_reach_the_engine_as_those_of_the_other_routes_do(gateway):
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 5, "stop": "x", "min_p": 0.1}
    await gateway.answer("/generate", {**BODY, **fields})
    await gateway.answer("/v1/completions", {**BODY, **fields})
    ours, theirs = (call for call in gateway.service.calls)
    assert ours.request.sampling == theirs.request.sampling
    assert ours.stop == theirs.stop


async def test_what_else_was_asked_stands_beside_the_text(gateway):
    fields = {"logprobs": 1, "prompt_logprobs": 1, "return_token_ids": True, "max_tokens": 2}
    _, whole = await gateway.answer("/generate", {"prompt": "Hi", **fields})
    assert whole["prompt_token_ids"] == [256, 72, 105]
    assert whole["prompt_logprobs"][0] is None
    assert [entry["token"] for entry in whole["logprobs"]] == ["G", "r"]
    first, second, _ = await gateway.stream("/generate/stream", {"prompt": "Hi", **fields})
    first, second = json.loads(first), json.loads(second)
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert first["prompt_logprobs"] == whole["prompt_logprobs"]
    assert "prompt_token_ids" not in second
    assert first["logprobs"] + second["logprobs"] == whole["logprobs"]


async def test_without_max_tokens_an_answer_goes_on_to_its_end_or_the_operators_bound():
    async with running(default_max_tokens=5) as gateway:
        _, body = await gateway.answer("/generate", {"prompt": "Hi"})
        assert (body["finish_reason"], len(body["token_ids"])) == ("length", 5)


@pytest.mark.parametrize(
    "fields, param",
    [
        ({}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt[0]"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [999]}, "prompt[0]"),
        ({**BODY, "max_tokens": 0}, "max_tokens"),
        ({**BODY, "n": 2}, "n"),
        ({**BODY, "best_of": 2}, "best_of"),
        ({**BODY, "best_of": True}, "best_of"),
        ({**BODY, "temperature": 3}, "temperature"),
        ({"prompt": "a" * 4096}, "prompt"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate/stream", "/v1/generate"])
async def test_bad_input_is_named_as_on_the_other_routes(gateway, path, fields, param):
    status, body = await gateway.answer(path, fields)
    assert (status, body["error"]["param"]) == (400, param), body
    assert gateway.service.calls == []


async def test_the_stream_route_does_not_take_a_no_for_a_stream(gateway):
    status, body = await gateway.answer("/generate/stream", {**BODY, "stream": False})
    assert (status, body["error"]["param"]) == (400, "stream")


async def test_a_full_queue_is_an_answer_before_the_stream_begins(gateway):
    async def script(call):
        raise QueueFullError("full", retry_after_s=2.0)
        yield

    gateway.service.script = script
    for path in ("/generate", "/generate/stream"):
        async with gateway.post(path, BODY) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "2")


@pytest.mark.parametrize("path", ["/generate", "/generate/stream"])
async def test_a_client_that_leaves_frees_what_it_held(path):
    async with running(FakeService(token_s=60)) as gateway:
        asking = asyncio.create_task(gateway.answer(path, BODY))
        await until(lambda: gateway.service.open)
        asking.cancel()
        await until(lambda: not gateway.service.open)


async def test_trouble_in_the_middle_of_a_stream_is_its_last_event(gateway):
    async def script(call):
        yield TextDelta(index=0, text="a", token_ids=[97])
        yield TextDelta(index=0, text="", token_ids=[], finish_reason="error", error="It broke.")

    gateway.service.script = script
    first, last = await gateway.stream("/generate/stream", BODY)
    assert json.loads(first)["text"] == "a"
    assert "It broke." in json.loads(last)["error"]["message"]
