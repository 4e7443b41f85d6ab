"""Real clients against a real server and the real model: alone, streaming, and sixteen at once."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator
from langchain_openai import ChatOpenAI

pytestmark = pytest.mark.alone

QUESTIONS = [f"Write one sentence about the number {n}." for n in range(16)]
OPTIONS = {"model": "smollm2", "temperature": 0, "max_tokens": 24}


def ask(question):
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.base_url, api_key="any") as made:
        yield made


@pytest.fixture(scope="module")
def answers_alone(client):
    """What each question is answered when nobody else asks."""
    return [
        client.chat.completions.create(messages=ask(question), **OPTIONS).choices[0].message.content
        for question in QUESTIONS
    ]


def joined(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_the_model_answers_sensibly(client):
    # Asked plainly, this small model in float32 is of two minds already at its first word.
    question = "Complete the sentence: The capital of France is"
    answer = client.chat.completions.create(messages=ask(question), **OPTIONS)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens > 5
    assert answer.usage.completion_tokens > 3


def test_a_stream_says_what_a_plain_answer_says(client, answers_alone):
    stream = client.chat.completions.create(
        messages=ask(QUESTIONS[3]), stream=True, stream_options={"include_usage": True}, **OPTIONS
    )
    chunks = list(stream)
    assert joined(chunks) == answers_alone[3]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")


async def test_sixteen_streams_at_once_each_get_what_they_get_alone(server, answers_alone):
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="any") as client:

        async def stream(question):
            made = await client.chat.completions.create(messages=ask(question), stream=True, **OPTIONS)
            return joined([chunk async for chunk in made])

        answers = await asyncio.gather(*map(stream, QUESTIONS))
    assert answers == answers_alone


def test_langchain_invokes_streams_and_batches(server, answers_alone):
    chat = ChatOpenAI(base_url=server.base_url, api_key="any", model="smollm2", temperature=0, max_tokens=24)
    assert chat.invoke(QUESTIONS[0]).content == answers_alone[0]
    assert "".join(chunk.content for chunk in chat.stream(QUESTIONS[1])) == answers_alone[1]
    batch = chat.batch(QUESTIONS, config={"max_concurrency": 16})
    assert [message.content for message in batch] == answers_alone


def test_a_seed_gives_the_same_text_alone_and_in_company(server, client):
    options = {**OPTIONS, "temperature": 1.0, "seed": 42}
    alone = client.chat.completions.create(messages=ask(QUESTIONS[5]), **options).choices[0].message.content

    async def crowd():
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="any") as many:

            async def one(question, seed):
                answer = await many.chat.completions.create(messages=ask(question), **{**options, "seed": seed})
                return answer.choices[0].message.content

            company = [one(question, seed) for seed, question in enumerate(QUESTIONS)]
            return (await asyncio.gather(one(QUESTIONS[5], 42), *company))[0]

    assert asyncio.run(crowd()) == alone


def test_three_choices_are_three_different_answers(client):
    answer = client.chat.completions.create(
        messages=ask("Tell me a story."), n=3, **{**OPTIONS, "temperature": 1.0, "seed": 7}
    )
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_a_stop_string_ends_the_answer_before_itself(client, answers_alone):
    stop = answers_alone[2].split()[3]
    answer = client.chat.completions.create(messages=ask(QUESTIONS[2]), stop=stop, **OPTIONS)
    assert answer.choices[0].message.content == answers_alone[2].split(stop)[0]
    assert answer.choices[0].finish_reason == "stop"


def test_completions_continue_text(client):
    answer = client.completions.create(
        model="smollm2", prompt="The capital of France is", max_tokens=8, temperature=0, logprobs=2, echo=True
    )
    assert answer.choices[0].text.startswith("The capital of France is")
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.total_tokens


def test_the_sdk_raises_its_own_exceptions(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(messages=ask("?"), **{**OPTIONS, "model": "nothing"})
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=ask("?"), **{**OPTIONS, "temperature": 3})
    assert caught.value.body["param"] == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="smollm2", prompt="word " * 20_000)
    assert caught.value.body["code"] == "context_length_exceeded"


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").id == "smollm2"


def test_the_second_turn_of_a_chat_computes_little_more_than_what_is_new(client):
    turns = ask("Name a colour. " + "Be brief. " * 60)
    first = client.chat.completions.create(messages=turns, **OPTIONS)
    turns += [{"role": "assistant", "content": first.choices[0].message.content}, *ask("Another one?")]
    second = client.chat.completions.create(messages=turns, **OPTIONS)
    computed = second.usage.prompt_tokens - second.usage.prompt_tokens_details.cached_tokens
    new = second.usage.prompt_tokens - first.usage.prompt_tokens - first.usage.completion_tokens
    # The answer's last token was never fed back, and the block it lies in may be computed again.
    assert computed <= new + 1 + 16


def test_a_client_that_leaves_does_not_hold_anybody_up(server, client):
    with httpx.stream(
        "POST", server.base_url + "/chat/completions", json={"messages": ask("Count to 1000."), "stream": True}
    ) as response:
        next(response.iter_lines())
    began = time.monotonic()
    client.chat.completions.create(messages=ask("Hi"), **{**OPTIONS, "max_tokens": 1})
    assert time.monotonic() - began < 5


@pytest.fixture(scope="module")
def document(server):
    return httpx.get(f"{server.url}/openapi.json").json()


def check(document, schema, value):
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def test_generate_tells_true_times_and_a_stream_says_the_same_text(server, document):
    body = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "speculation": "off"}
    whole = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
    check(document, {"$ref": "#/components/schemas/GenerateAnswer"}, whole)
    metrics = whole["metrics"]
    assert 0 <= metrics["queue_time_s"] <= metrics["time_to_first_token_s"] < metrics["generation_time_s"]
    decoding_s = metrics["generation_time_s"] - metrics["time_to_first_token_s"]
    assert 0 < metrics["tokens_per_second"] <= (len(whole["token_ids"]) - 1) / decoding_s * 1.01
    arrivals, events = [], []
    with httpx.stream("POST", f"{server.url}/generate/stream", json=body, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                arrivals.append(time.perf_counter())
                events.append(json.loads(line.removeprefix("data: ")))
    for event in events:
        check(document, {"$ref": "#/components/schemas/GenerateEvent"}, event)
    assert "".join(event["text"] for event in events) == whole["text"]
    assert [token for event in events for token in event["token_ids"]] == whole["token_ids"]
    assert len(events) > 5
    assert arrivals[-1] - arrivals[0] > events[-1]["metrics"]["generation_time_s"] / 4


def test_every_example_of_the_description_works_with_a_real_model(server, document):
    def ask(path, operation, example):
        response = httpx.post(server.url + path, json=example, timeout=120)
        assert response.status_code == 200, (path, example, response.text)
        if response.headers["content-type"].startswith("application/json"):
            schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
            check(document, schema, response.json())
        else:
            assert response.text.endswith("data: [DONE]\n\n")

    asked = [
        (path, operation, example["value"])
        for path, methods in document["paths"].items()
        for operation in methods.values()
        for example in operation.get("requestBody", {"content": {}})["content"]
        .get("application/json", {})
        .get("examples", {})
        .values()
    ]
    assert len(asked) > 8
    with ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(ask, *zip(*asked, strict=True)))
