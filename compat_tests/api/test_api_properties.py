"""Whatever JSON is sent: never a 5xx, and every refusal is shaped as OpenAI's errors are."""

import asyncio
import json

import pytest
from conftest import running
from fake_service import FakeService
from hypothesis import given
from hypothesis import strategies as st

from helix_gateway.gateway.schemas.chat import ChatRequest
from helix_gateway.gateway.schemas.completions import CompletionRequest

PATHS = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 130)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["text", "user", "assistant", "tool", "none", "off", "tiny", "tokens"])
)
keys = st.text(max_size=8) | st.sampled_from(["type", "text", "role", "content", "name", "include_usage", "5", "97"])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "developer"])},
        optional={"content": st.text(max_size=30) | values, "name": values, "tool_calls": values, "odd": values},
    ),
    max_size=4,
)


def bodies(schema):
    known = st.dictionaries(st.sampled_from(sorted(schema.model_fields)) | keys, values, max_size=6)
    good = st.fixed_dictionaries({"messages": messages, "prompt": st.text(max_size=20) | values})
    return st.one_of(known, st.builds(lambda base, extra: {**base, **extra}, good, known), values)


@pytest.fixture(scope="module")
def loop_and_gateway():
    """One gateway for all examples, on a loop of its own: hypothesis calls a plain function."""
    loop = asyncio.new_event_loop()
    entering = running(FakeService("ok"))
    gateway = loop.run_until_complete(entering.__aenter__())
    yield loop, gateway
    loop.run_until_complete(entering.__aexit__(None, None, None))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def ask(gateway, path, data):
    async with gateway.post(path, data) as response:
        assert response.status < 500, await response.text()
        assert response.headers["x-request-id"]
        if response.content_type == "text/event-stream":
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        elif response.status != 200:
            error = (await response.json())["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert isinstance(error["message"], str)
            assert error["param"] is None or isinstance(error["param"], str)
            assert response.headers["x-should-retry"] == "false"
        else:
            assert (await response.json())["choices"]


@pytest.mark.parametrize("path", PATHS)
def test_no_json_body_breaks_the_server(loop_and_gateway, path):
    loop, gateway = loop_and_gateway

    @given(bodies(PATHS[path]))
    def search(body):
        loop.run_until_complete(ask(gateway, path, json.dumps(body).encode()))

    search()


@pytest.mark.parametrize("path", PATHS)
def test_no_bytes_break_the_server(loop_and_gateway, path):
    loop, gateway = loop_and_gateway

    @given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\ud8e+-.0123tfnN ', max_size=40).map(str.encode))
    def search(data):
        loop.run_until_complete(ask(gateway, path, data))

    search()
