"""OpenAI's own SDK reads everything that the gateway writes, and raises its own classes for errors."""

import asyncio

import openai
import pytest
from conftest import running
from fake_service import ANSWER, FakeService

from helix_gateway.core.errors import EngineUnavailableError, QueueFullError
from helix_gateway.service.api import TextDelta

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def client(gateway):
    async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


async def test_chat(client):
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.refusal is None
    assert answer.choices[0].logprobs.content[0].token == "G"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    assert answer._request_id


async def test_chat_stream(client):
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, n=2, stream_options={"include_usage": True}
    )
    texts, finished, usage = ["", ""], [], None
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finished += [choice.index] if choice.finish_reason else []
        usage = chunk.usage or usage
    assert texts == [ANSWER, ANSWER]
    assert sorted(finished) == [0, 1]
    assert usage.total_tokens == 20 + 28


async def test_the_stream_helper_accumulates(client):
    async with client.chat.completions.stream(model="tiny", messages=MESSAGES, logprobs=True) as stream:
        async for _ in stream:
            pass
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == ANSWER
    assert len(completion.choices[0].logprobs.content) == len(ANSWER.encode())


async def test_completions(client):
    answer = await client.completions.create(model="tiny", prompt=["a", "b"], n=2, echo=True, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["a" + ANSWER] * 2 + ["b" + ANSWER] * 2
    assert answer.choices[0].logprobs.text_offset[:3] == [0, 0, 1]
    stream = await client.completions.create(model="tiny", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == ANSWER


async def test_models(client):
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).owned_by == "helix"


async def test_fields_of_local_servers_pass_through(client, gateway):
    extra = {"top_k": 5, "min_p": 0.1, "speculation": "off", "return_token_ids": True}
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=extra)
    assert answer.choices[0].token_ids == list(ANSWER.encode())
    assert gateway.service.calls[0].request.sampling.top_k == 5


async def test_errors_are_the_sdks_own_classes(client, gateway):
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model="tiny", messages=MESSAGES, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as unknown:
        await create(model="x", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    gateway.service.state = "restarting"
    with pytest.raises(openai.InternalServerError) as unavailable:
        await create(model="tiny", messages=MESSAGES)
    assert unavailable.value.code == "engine_unavailable"


async def test_wrong_keys_and_full_queues_are_too():
    async def script(call):
        raise QueueFullError("Full.", retry_after_s=0.01)
        yield

    async with running(api_keys=("right",)) as gateway:
        gateway.service.script = script
        async with openai.AsyncOpenAI(base_url=gateway.url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with openai.AsyncOpenAI(base_url=gateway.url, api_key="right", max_retries=2) as client:
            with pytest.raises(openai.RateLimitError):
                await client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert len(gateway.service.calls) == 3


async def test_what_cannot_help_is_not_tried_again(gateway):
    async with openai.AsyncOpenAI(base_url=gateway.url, api_key="x", max_retries=3) as client:
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="tiny", messages=MESSAGES, n=0)


async def test_trouble_midway_raises_in_the_clients_loop(client, gateway):
    async def script(call):
        yield TextDelta(index=0, text="a", token_ids=[1])
        raise EngineUnavailableError("The engine died.")

    gateway.service.script = script
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="The engine died"):
        async for _ in stream:
            pass


async def test_the_sync_client_streams_too(gateway):
    def talk():
        with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client:
            stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(talk) == ANSWER


async def test_sixteen_clients_at_once():
    async def talk(client):
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with (
        running(FakeService("x" * 30, token_s=0.001)) as gateway,
        openai.AsyncOpenAI(base_url=gateway.url, api_key="any", max_retries=0) as client,
    ):
        assert await asyncio.gather(*(talk(client) for _ in range(16))) == ["x" * 30] * 16
