"""WIRE's table of errors, row by row, through a real socket."""

import json

import aiohttp
import pytest
from conftest import chat_body, running
from fake_service import FakeService

from helix_gateway.core.errors import OutOfMemoryError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


async def error_of(response):
    """The error object, checked for what every error has."""
    assert response.content_type == "application/json"
    assert response.headers["x-request-id"]
    assert response.headers["openai-processing-ms"].isdigit()
    body = await response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    "body, param",
    [
        (b'{"messages": [', None),
        (b"[]", None),
        (chat_body(messages=5), "messages"),
        (chat_body(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
        (chat_body(messages=[{"role": "user", "content": "a"}, {"role": "x", "content": ""}]), "messages[1].role"),
        (chat_body(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0]"),
        (
            chat_body(messages=[{"role": "user", "content": [{"type": "text", "text": 1}]}]),
            "messages[0].content[0].text",
        ),
        (chat_body(temperature=-1), "temperature"),
        (chat_body(stop=["a", 1]), "stop[1]"),
        (chat_body(stream_options={"include_usage": "x"}), "stream_options.include_usage"),
    ],
    ids=str,
)
async def test_bad_input_is_400_and_names_the_path(gateway, body, param):
    async with gateway.post(CHAT, body) as response:
        assert response.status == 400
        assert response.headers["x-should-retry"] == "false"
        error = await error_of(response)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, None)


@pytest.mark.parametrize(
    "path, body, param",
    [
        (CHAT, chat_body("x" * 600), "messages"),
        (COMPLETIONS, {"prompt": "x" * 600}, "prompt"),
        (COMPLETIONS, {"prompt": [1] * 600}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "x" * 511]}, "prompt[1]"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_prompt_that_does_not_fit_is_told_both_numbers(gateway, path, body, param):
    async with gateway.post(path, body) as response:
        assert response.status == 400
        error = await error_of(response)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    numbers = [int(word) for word in error["message"].replace(",", " ").replace(".", " ").split() if word.isdigit()]
    assert 512 in numbers
    assert any(512 <= number <= 640 for number in numbers if number != 512) or numbers.count(512) == 2


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer ", "Basic secret", "secret", "Bearer sécret"])
@pytest.mark.parametrize("path", [CHAT, "/completions", "/v1/models", "/v1/models/tiny", "/nowhere"])
async def test_a_missing_or_wrong_key_is_401(key, path):
    async with running(api_keys=("secret",)) as gateway:
        headers = {} if key is None else {"Authorization": key}
        async with gateway.post(path, chat_body(), headers=headers) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert response.headers["x-should-retry"] == "false"
            assert (await error_of(response))["code"] == "invalid_api_key"


async def test_the_right_key_opens_and_probes_need_none():
    async with running(api_keys=("secret",)) as gateway:
        for scheme in ("Bearer", "bearer"):
            async with gateway.post(CHAT, chat_body(), headers={"Authorization": f"{scheme} secret"}) as response:
                assert response.status == 200
        for path in ("/", "/health", "/ready", "/v1/health/"):
            async with gateway.get(path) as response:
                assert response.status == 200


@pytest.mark.parametrize("key", [None, "Bearer anything", "Bearer "])
async def test_any_key_is_fine_where_none_is_set(gateway, key):
    async with gateway.post(CHAT, chat_body(), headers={} if key is None else {"Authorization": key}) as response:
        assert response.status == 200


async def test_an_unknown_model_is_404(gateway):
    for path, body in ((CHAT, chat_body(model="gpt-9")), (COMPLETIONS, {"model": "gpt-9", "prompt": "a"})):
        async with gateway.post(path, body) as response:
            assert response.status == 404
            error = await error_of(response)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert error["message"] == "There is no model `gpt-9` on this server. It serves: `tiny`."
    async with gateway.get("/v1/models/gpt-9") as response:
        assert response.status == 404
        assert (await error_of(response))["code"] == "model_not_found"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/nothing", "/favicon.ico", "/v1/chat", "/v2/models"])
async def test_an_unknown_route_is_404(gateway, method, path):
    async with gateway.session.request(method, gateway.url + path) as response:
        assert response.status == 404
        assert (await error_of(response))["code"] == "not_found"


async def test_a_route_of_openais_that_is_not_here_names_those_that_are(gateway):
    async with gateway.post("/v1/responses", chat_body()) as response:
        message = (await error_of(response))["message"]
    assert "POST /v1/responses is not a route" in message
    assert "POST /v1/chat/completions" in message


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("GET", CHAT, "POST"),
        ("DELETE", "/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/health", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_405_with_allow(gateway, method, path, allowed):
    async with gateway.session.request(method, gateway.url + path) as response:
        assert response.status == 405
        assert response.headers["Allow"] == allowed
        assert (await error_of(response))["type"] == "invalid_request_error"


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_over_the_limit_is_413(chunked):
    async def pieces():
        for _ in range(20):
            yield b" " * 1000

    async with running(max_body_bytes=10_000) as gateway:
        body = pieces() if chunked else b" " * 20_000
        async with gateway.session.post(gateway.url + CHAT, data=body) as response:
            assert response.status == 413
            assert response.headers["x-should-retry"] == "false"
            assert "10000" in (await error_of(response))["message"]


@pytest.mark.parametrize("state", ["starting", "restarting", "stopped"])
async def test_an_engine_that_is_not_there_is_503_and_says_when_to_come_again(gateway, state):
    gateway.service.state = state
    async with gateway.post(CHAT, chat_body()) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 1
        assert response.headers.get("x-should-retry") != "false"
        error = await error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "engine_unavailable")
    assert state in error["message"]


async def test_our_own_fault_is_500_with_the_request_id_and_no_traceback(gateway):
    async def script(call):
        raise RuntimeError("the secret inside")
        yield

    gateway.service.script = script
    async with gateway.post(CHAT, chat_body(), headers={"x-request-id": "mine-1"}) as response:
        assert response.status == 500
        error = await error_of(response)
    assert error["type"] == "server_error"
    assert "mine-1" in error["message"]
    assert "secret" not in json.dumps(error)
    assert "Traceback" not in json.dumps(error)


async def test_what_can_never_fit_in_memory_is_not_tried_again(gateway):
    async def script(call):
        raise OutOfMemoryError("The pool cannot hold it.")
        yield

    gateway.service.script = script
    async with gateway.post(CHAT, chat_body()) as response:
        assert response.status == 500
        assert response.headers["x-should-retry"] == "false"
        assert (await error_of(response))["code"] == "out_of_memory"


async def test_a_template_that_raises_is_400_with_its_message(gateway):
    async with gateway.post(CHAT, chat_body("please refuse me")) as response:
        assert response.status == 400
        assert (await error_of(response))["message"] == "The template does not like it."


@pytest.mark.parametrize(
    "sent, kept",
    [("abc-123", True), ("a" * 128, True), ("a" * 129, False), ("with space", False), ("", False), ("é", False)],
)
async def test_the_clients_own_request_id_is_kept_if_it_is_sane(gateway, sent, kept):
    async with gateway.post(CHAT, chat_body(), headers={"x-request-id": sent}) as response:
        assert (response.headers["x-request-id"] == sent) is kept
        assert response.headers["x-request-id"]


async def test_what_is_not_even_http_is_answered_in_the_same_shape(gateway):
    import asyncio

    for sent in (
        b"garbage\r\n\r\n",
        b"GET / HTTP/1.1\r\nBad Header\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b" 400 " in head.splitlines()[0]
        assert b"x-request-id" in head
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_a_body_that_lies_about_its_encoding_is_400(gateway):
    async with gateway.session.post(
        gateway.url + CHAT, data=b"not gzip", headers={"Content-Encoding": "gzip"}, skip_auto_headers=["Content-Type"]
    ) as response:
        assert response.status == 400
        assert (await error_of(response))["type"] == "invalid_request_error"


async def test_two_models_need_to_be_named():
    first, second = FakeService("one"), FakeService("two")
    async with running(models={"a/one": first, "b/two": second}) as gateway:
        status, body = await gateway.answer(CHAT, {"messages": [{"role": "user", "content": "a"}]})
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        status, body = await gateway.answer(CHAT, chat_body(model="b/two"))
        assert (status, body["model"], body["choices"][0]["message"]["content"]) == (200, "b/two", "two")


@pytest.mark.parametrize("model", [{}, {"model": ""}, {"model": None}])
async def test_no_model_is_the_one_that_is_served(gateway, model):
    body = {"messages": [{"role": "user", "content": "a"}], **model}
    status, answer = await gateway.answer(CHAT, body)
    assert (status, answer["model"]) == (200, "tiny")


async def test_errors_do_not_end_a_connection(gateway):
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector) as session:
        for body in (b"{", b'{"messages": 1}', json.dumps(chat_body()).encode()) * 3:
            async with session.post(gateway.url + CHAT, data=body) as response:
                await response.read()
                assert response.status == (200 if b"tiny" in body else 400)
