"""Options that were checked once are known again: nobody notices but by the clock."""

import copy
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer
from conftest import chat_body
from fake_service import FakeService

from helix_gateway.gateway import known_options
from helix_gateway.gateway.app import create_app
from helix_gateway.gateway.body import parse_body
from helix_gateway.gateway.known_options import KnownOptions, key_of
from helix_gateway.gateway.schemas.chat import ChatRequest
from helix_gateway.gateway.schemas.completions import CompletionRequest
from helix_gateway.gateway.schemas.generate import GenerateRequest, GenerateStreamRequest
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.gateway.state import KNOWN_OPTIONS

CHAT = "/v1/chat/completions"
OPTIONS = {"temperature": 0.5, "stop_token_ids": [3], "logit_bias": {"5": 1.0}, "odd": 1}
MOST_OPTIONS = {
    "temperature": 0.5,
    "stop_token_ids": [3],
    "logit_bias": {"5": 1.0},
    "max_tokens": 4,
    "prompt_logprobs": 1,
    "return_token_ids": True,
    "response_format": {"type": "text"},
    "speculation": 2,
}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
SCHEMAS = (ChatRequest, CompletionRequest, GenerateRequest)
PROMPTS = {"messages": {"messages": [{"role": "user", "content": "x"}]}, "prompt": {"prompt": "x"}}
CHAT_OPTIONS = ChatRequest(messages=[{"role": "user", "content": "x"}])
WRONG_MESSAGES = [
    None,
    [],
    "hello",
    [5],
    [{"role": "user", "content": 5}],
    [{"role": "nobody", "content": "x"}],
    [{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}],
    [{"role": "user", "content": "x", "tool_calls": [{}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
]


async def test_the_same_options_with_another_prompt_are_asked_of_the_engine_alike(gateway):
    for text in ("first", "second", "third"):
        await gateway.chat(text=text, **OPTIONS)
    calls = gateway.service.calls[-3:]
    assert [len(call.request.prompt_token_ids) for call in calls] == [23, 24, 23]
    first, third = (msgspec.structs.replace(call.request.sampling, seed=0) for call in (calls[0], calls[2]))
    assert first == third
    assert calls[0].stop == calls[1].stop == calls[2].stop


@pytest.mark.parametrize("messages", WRONG_MESSAGES)
async def test_a_wrong_prompt_is_told_in_the_same_words_whether_its_options_are_known_or_not(gateway, messages):
    body = {**chat_body(), "top_k": 11}
    unknown = await gateway.answer(CHAT, {**body, "top_k": 12, "messages": messages})
    await gateway.chat(**body)
    known = await gateway.answer(CHAT, {**body, "messages": messages})
    assert unknown[0] == known[0] == 400
    assert unknown[1] == known[1]


async def test_unknown_fields_are_named_each_time(gateway):
    named = []
    for message in ({}, {"mood": 1}, {}, {"mood": 1}):
        body = chat_body(top_k=13, odd=1)
        body["messages"][0].update(message)
        async with gateway.post(CHAT, body) as response:
            named.append(response.headers["x-helix-ignored-fields"])
    assert named == ["odd", "odd, messages[].mood", "odd", "odd, messages[].mood"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "plain"}],
        [{"role": "developer", "content": "é"}, {"role": "user", "content": ""}],
        [{"role": "user", "content": "named", "name": "Ada"}],
        [{"role": "user", "content": [{"type": "text", "text": "in"}, {"type": "text", "text": "parts"}]}],
        [{"role": "assistant", "content": None}, {"role": "user", "content": "x", "refusal": None}],
    ],
)
async def test_known_or_not_messages_of_every_form_become_the_same_prompt(gateway, messages):
    for top_k in (14, 15, 15):
        await gateway.chat(messages=messages, top_k=top_k)
    asked = [call.request.prompt_token_ids for call in gateway.service.calls[-3:]]
    assert asked[0] == asked[1] == asked[2]


def test_prompts_are_not_kept_and_routes_do_not_share_options():
    known = KnownOptions()
    chat = parse_body(b'{"messages": [{"role": "user", "content": "secret"}], "n": 2}', ChatRequest, known)
    completion = parse_body(b'{"prompt": "secret", "n": 2}', CompletionRequest, known)
    assert (chat.prompt[0].content, completion.prompt) == ("secret", b'"secret"')
    assert "secret" not in repr(known.__dict__)
    again = parse_body(b'{"n": 2, "prompt": "other"}', CompletionRequest, known)
    assert again.fields is completion.fields
    assert again.prompt == b'"other"'


def test_no_more_than_so_many_are_kept_and_none_that_are_long(monkeypatch):
    monkeypatch.setattr(known_options, "MOST_KNOWN", 3)
    known = KnownOptions()
    keys = [key_of(ChatRequest, {"top_k": str(top_k).encode()}) for top_k in range(5)]
    for key in keys:
        known.remember(key, CHAT_OPTIONS)
    assert [known.find(key) is not None for key in keys] == [False, False, True, True, True]
    long = key_of(ChatRequest, {"logit_bias": b"x" * (known_options.MOST_BYTES + 1)})
    known.remember(long, CHAT_OPTIONS)
    assert known.find(long) is None


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize(
    "field",
    [
        {"stop": "secret"},
        {"stop": ["a", "secret"]},
        {"bad_words": ["secret"]},
        {"cache_salt": "secret"},
        {"prediction": {"type": "content", "content": "secret"}},
        {"stream_options": {"secret": True}},
        {"response_format": {"type": "text", "more": "secret"}},
        {"user": "secret"},
        {"metadata": {"secret": "secret"}},
        {"secret": "secret"},
    ],
)
def test_no_text_of_a_client_is_kept(schema, field):
    known = KnownOptions()
    body = {**PROMPTS[schema.prompt_field], "top_k": 5, **field}
    parse_body(json.dumps(body).encode(), schema, known)
    assert "secret" not in repr(known._checked)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_what_only_one_request_says_puts_out_nothing(schema):
    known = KnownOptions()
    shared = {**PROMPTS[schema.prompt_field], "top_k": 5, "seed": None, "stop": None}
    first = parse_body(json.dumps(shared).encode(), schema, known)
    for seed in range(known_options.MOST_KNOWN):
        parse_body(json.dumps({**shared, "seed": seed}).encode(), schema, known)
    assert parse_body(json.dumps(shared).encode(), schema, known).fields is first.fields
    assert len(known._checked) == 1


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field_that_is_one_requests_own_is_a_field(schema):
    assert schema.own_fields <= schema.model_fields.keys()


async def test_each_application_remembers_for_itself():
    asked, other = (create_app(GatewaySettings(), {"tiny": FakeService()}) for _ in range(2))
    async with TestClient(TestServer(asked)) as client:
        for text in ("first", "second"):
            assert (await client.post(CHAT, json=chat_body(text=text))).status == 200
    assert len(asked[KNOWN_OPTIONS]._checked) == 1
    assert not other[KNOWN_OPTIONS]._checked


@pytest.mark.parametrize("schema", SCHEMAS)
def test_options_have_no_prompt_to_ask_them_for(schema):
    known = KnownOptions()
    body = json.dumps({**PROMPTS[schema.prompt_field], "top_k": 5}).encode()
    for _ in range(2):
        options = parse_body(body, schema, known).fields
        with pytest.raises(AttributeError, match=schema.prompt_field):
            getattr(options, schema.prompt_field)
        assert options.model_fields_set == {"top_k"}


@pytest.mark.parametrize(
    "path, schema, more",
    [
        (CHAT, ChatRequest, {**MOST_OPTIONS, "logprobs": True, "top_logprobs": 2, "best_of": 3, "n": 2}),
        (CHAT, ChatRequest, {**MOST_OPTIONS, "tools": [], "functions": [], "modalities": ["text"]}),
        (CHAT, ChatRequest, {**MOST_OPTIONS, **STREAMED}),
        ("/v1/completions", CompletionRequest, {**MOST_OPTIONS, "logprobs": 2, "echo": True, "n": 2}),
        ("/v1/completions", CompletionRequest, {**MOST_OPTIONS, **STREAMED}),
        ("/generate", GenerateRequest, {**MOST_OPTIONS, "logprobs": 2}),
        ("/generate/stream", GenerateStreamRequest, {**MOST_OPTIONS, "stream": True}),
    ],
)
async def test_no_route_changes_what_is_remembered(path, schema, more):
    app = create_app(GatewaySettings(), {"tiny": FakeService()})
    body = json.dumps({**PROMPTS[schema.prompt_field], **more}).encode()
    shared = parse_body(body, schema, app[KNOWN_OPTIONS]).fields
    before = copy.deepcopy(vars(shared))
    async with TestClient(TestServer(app)) as client:
        for _ in range(2):
            answer = await client.post(path, data=body)
            assert answer.status == 200, await answer.text()
            assert "error" not in await answer.text()
    assert parse_body(body, schema, app[KNOWN_OPTIONS]).fields is shared
    assert vars(shared) == before


@pytest.fixture
def hasty_threads():
    """Threads that take turns after a few operations."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_several_threads_may_remember_at_once(monkeypatch, hasty_threads):
    monkeypatch.setattr(known_options, "MOST_KNOWN", 4)
    known = KnownOptions()

    def remember(thread):
        for number in range(5000):
            key = key_of(ChatRequest, {"top_k": b"%d" % (5000 * thread + number)})
            known.remember(key, CHAT_OPTIONS)
            known.find(key)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(remember, range(4)))
    assert len(known._checked) == 4


def test_options_that_are_remembered_again_put_out_no_others(monkeypatch):
    monkeypatch.setattr(known_options, "MOST_KNOWN", 2)
    known = KnownOptions()
    first, second = (key_of(ChatRequest, {"top_k": top_k}) for top_k in (b"1", b"2"))
    for key in (first, second, second):
        known.remember(key, CHAT_OPTIONS)
    assert known.find(first) is not None
