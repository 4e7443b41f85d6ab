"""`/openapi.json` says what the server does: every route, every answer, every error, and examples that work."""

import re
from pathlib import Path

import pytest
from conftest import chat_body, running
from described import Description
from fake_service import FakeService
from jsonschema import Draft202012Validator, ValidationError

from helix_gateway.core.errors import QueueFullError
from helix_gateway.gateway import errors, openapi
from helix_gateway.gateway.app import create_app
from helix_gateway.gateway.settings import GatewaySettings

CHAT, TEXT, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
ALL_OF_IT = {"return_token_ids": True, "prompt_logprobs": 2, "n": 2, "stop": "!"}


@pytest.fixture
async def described(gateway):
    gateway.described = await Description.of(gateway)
    return gateway


def routes_of(app):
    """Every route of the router, in the spelling without /v1 and without a slash at the end."""
    for route in app.router.routes():
        if route.method != "HEAD":
            yield route.method, route.resource.canonical.removeprefix("/v1").rstrip("/") or "/"


async def test_every_route_is_described_and_every_described_route_exists(described):
    app = create_app(GatewaySettings(), {"tiny": FakeService()})
    told = {(method, path.removeprefix("/v1")) for method, path in described.described.operations}
    assert set(routes_of(app)) == told


async def test_every_route_says_what_it_is_and_what_it_answers(described):
    ids = [operation["operationId"] for operation in described.described.operations.values()]
    assert len(ids) == len(set(ids))
    for route, operation in described.described.operations.items():
        assert operation["summary"], route
        assert any(status.startswith("2") for status in operation["responses"]), route
        assert operation["tags"][0] in {tag["name"] for tag in described.described.document["tags"]}


def test_every_status_that_the_gateway_gives_is_described():
    given = set()
    for file in Path(errors.__file__).parent.rglob("*.py"):
        given |= {int(code) for code in re.findall(r"(?:ApiError|cls)\(\s*(\d{3}),", file.read_text())}
    assert {400, 429, 503} < given
    no_route = {405, 408}  # a wrong method; an error in the middle of a stream
    assert given - no_route == set(openapi.ERRORS)


async def test_every_field_of_a_request_is_explained_with_its_default(described):
    schemas = described.described.document["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "GenerateRequest", "ChatMessage"):
        for field, schema in schemas[name]["properties"].items():
            assert "description" in schema or "$ref" in str(schema), (name, field)
    temperature = schemas["ChatRequest"]["properties"]["temperature"]
    assert (temperature["minimum"], temperature["maximum"], temperature["default"]) == (0, 2, 1)
    assert temperature["type"] == ["number", "null"]
    assert schemas["ChatRequest"]["required"] == ["messages"]


async def test_schemas_are_json_schemas_and_references_lead_somewhere(described):
    components = described.described.document["components"]

    def walk(value):
        if isinstance(value, dict):
            if "$ref" in value:
                kind, name = value["$ref"].removeprefix("#/components/").split("/")
                assert name in components[kind]
            value = value.values()
        for item in value if not isinstance(value, str | int | float | None) else ():
            walk(item)

    walk(described.described.document)
    for schema in components["schemas"].values():
        Draft202012Validator.check_schema(schema)


async def test_every_example_works_and_is_answered_as_described(described):
    tried = 0
    for (method, path), operation in described.described.operations.items():
        media = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        for example in media.get("examples", {}).values():
            described.described.check(media["schema"], example["value"])
            async with described.post(path, example["value"]) as response:
                assert response.status == 200, (path, example)
                assert "x-helix-ignored-fields" not in response.headers
                assert await described.described.hold(method, path, response)
            tried += 1
    assert tried >= 8


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path, body",
    [
        (CHAT, chat_body(**ALL_OF_IT, logprobs=True, top_logprobs=2)),
        (CHAT, chat_body(stream_options={"include_usage": True})),
        (CHAT, chat_body(max_tokens=3)),
        (TEXT, {"prompt": ["a", "b"], **ALL_OF_IT, "logprobs": 2, "echo": True}),
        (TEXT, {"prompt": "a", "stream_options": {"include_usage": True}}),
        (TEXT, {"prompt": [97, 98], "max_tokens": 0, "echo": True, "logprobs": 0}),
        (GENERATE, {"prompt": [97], **ALL_OF_IT, "n": 1, "logprobs": 2}),
        (GENERATE, {"prompt": "a", "max_tokens": 1}),
    ],
)
async def test_answers_are_as_described_whatever_was_asked(described, path, body, stream):
    async with described.post(path, {**body, "stream": stream}) as response:
        assert response.status == 200, await response.text()
        assert await described.described.hold("POST", path, response)


async def test_a_field_that_nobody_described_would_be_noticed(described):
    body = await described.chat()
    schema = described.described.content("POST", CHAT, 200, "application/json")["schema"]
    described.described.check(schema, body)
    with pytest.raises(ValidationError):
        described.described.check(schema, {**body, "surprise": 1})
    body["choices"][0]["message"].pop("refusal")
    with pytest.raises(ValidationError):
        described.described.check(schema, body)


@pytest.mark.parametrize("state", ["ready", "starting"])
@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/v1/models/tiny", "/openapi.json"])
async def test_what_the_server_says_of_itself_is_as_described(described, path, state):
    described.service.state = state
    async with described.get(path) as response:
        assert await described.described.hold("GET", path, response)


@pytest.mark.parametrize(
    "status, path, body, settings, state",
    [
        (400, CHAT, {}, {}, "ready"),
        (400, GENERATE, {"prompt": 5}, {}, "ready"),
        (401, TEXT, {"prompt": "a"}, {"api_keys": ("k",)}, "ready"),
        (404, CHAT, {"model": "x", "messages": [{"role": "user"}]}, {}, "ready"),
        (413, TEXT, {"prompt": "a" * 2000}, {"max_body_bytes": 1000}, "ready"),
        (429, GENERATE, {"prompt": "busy"}, {}, "ready"),
        (500, GENERATE, {"prompt": "broken"}, {}, "ready"),
        (503, TEXT, {"prompt": "a"}, {}, "restarting"),
    ],
)
async def test_errors_are_as_described(status, path, body, settings, state):
    async def script(call):
        raise QueueFullError("full", retry_after_s=1.0) if status == 429 else RuntimeError
        yield

    async with running(**settings) as gateway:
        description = await Description.of(gateway)
        gateway.service.state = state
        gateway.service.script = script if status in (429, 500) else None
        async with gateway.post(path, body) as response:
            assert response.status == status
            assert (await description.hold("POST", path, response))["error"]["message"]


async def test_what_tells_nothing_of_anybodys_work_needs_no_key_and_says_so():
    async with running(api_keys=("k",)) as gateway:
        description = await Description.of(gateway)
        for (method, path), operation in description.operations.items():
            if method == "GET" and "{" not in path:
                async with gateway.get(path) as response:
                    assert (response.status == 401) == ("security" in operation), path
                    assert ("401" in operation["responses"]) == ("security" in operation)
        for name in ("docs.css", "docs.js", "icon.svg"):
            async with gateway.get(f"/docs/{name}") as response:
                assert response.status == 200


async def test_the_page_and_what_it_loads_come_with_a_policy_that_allows_this_server_only(gateway):
    for path in ("/docs", "/docs/docs.js", "/docs/docs.css", "/docs/icon.svg"):
        async with gateway.get(path) as response:
            assert response.status == 200
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert set(policy.replace(";", " ").split()) & {"*", "'unsafe-inline'", "'unsafe-eval'", "https:"} == set()
    async with gateway.get("/docs/other.js") as response:
        assert response.status == 404
