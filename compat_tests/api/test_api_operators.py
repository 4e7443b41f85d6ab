"""What operators see: routes in every spelling, models, probes, the front page, sockets, log lines."""

import asyncio
import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import structlog
from conftest import chat_body, running, until
from fake_service import FakeService

from helix_gateway.gateway.addresses import BindError, bind, urls
from helix_gateway.gateway.settings import GatewaySettings

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize("slash", ["", "/"])
async def test_routes_answer_with_and_without_v1_and_with_a_slash_at_the_end(gateway, prefix, slash):
    for path, body in (("/chat/completions", chat_body()), ("/completions", {"prompt": "a"})):
        status, _ = await gateway.answer(prefix + path + slash, body)
        assert status == 200
    for path in ("/models", "/models/tiny", "/health", "/ready", ""):
        async with gateway.get(prefix + path + slash) as response:
            assert response.status == 200, path


async def test_models_are_listed_by_every_name():
    service = FakeService()
    async with running(service, served_model_names=("org/model", "alias")) as gateway:
        async with gateway.get("/v1/models") as response:
            listing = await response.json()
        assert listing["object"] == "list"
        assert [model["id"] for model in listing["data"]] == ["org/model", "alias"]
        for model in listing["data"]:
            assert (model["object"], model["root"], model["max_model_len"]) == ("model", "org/model", 512)
            assert isinstance(model["created"], int)
            assert model["owned_by"]


@pytest.mark.parametrize("path", ["/v1/models/org/model", "/models/org%2Fmodel", "/v1/models/org/model/"])
async def test_a_model_whose_id_has_slashes_is_found(path):
    async with running(served_model_names=("org/model",)) as gateway, gateway.get(path) as response:
        assert response.status == 200
        assert (await response.json())["id"] == "org/model"


async def test_answers_say_the_first_name_whatever_alias_was_asked_for():
    async with running(served_model_names=("org/model", "alias")) as gateway:
        assert (await gateway.chat(model="alias"))["model"] == "org/model"
        status, body = await gateway.answer(CHAT, {"messages": [{"role": "user", "content": "a"}]})
        assert (status, body["model"]) == (200, "org/model")


@pytest.mark.parametrize("state", ["starting", "restarting", "stopped"])
async def test_health_lives_while_ready_says_why_not(gateway, state):
    gateway.service.state = state
    async with gateway.get("/health") as response:
        assert response.status == 200
        assert (await response.json())["models"] == [{"id": "tiny", "state": state}]
    async with gateway.get("/ready") as response:
        assert response.status == 503
        assert response.headers["Retry-After"]
        assert (await response.json())["status"] == f"tiny is {state}"
    async with gateway.get("/v1/models") as response:
        assert response.status == 200
    gateway.service.state = "ready"
    async with gateway.get("/ready") as response:
        assert response.status == 200


async def test_the_front_page_says_what_this_is_and_where_things_are(gateway):
    async with gateway.get("/") as response:
        body = await response.json()
        assert body["models"] == ["tiny"]
        assert "POST /v1/chat/completions" in body["endpoints"]
    async with gateway.get("/", headers={"Accept": "text/html,*/*"}) as response:
        assert response.content_type == "text/html"
        assert "/v1/chat/completions" in await response.text()


async def test_a_model_name_cannot_put_script_into_the_front_page():
    async with (
        running(served_model_names=("<script>x</script>",)) as gateway,
        gateway.get("/", headers={"Accept": "text/html"}) as response,
    ):
        assert "<script>x" not in await response.text()


@pytest.fixture
def log_lines():
    with structlog.testing.capture_logs() as lines:
        yield lines


async def test_a_request_leaves_one_log_line_with_figures_and_without_its_text(gateway, log_lines):
    body = chat_body("the secret prompt", max_tokens=4096, odd=1)
    async with gateway.post(CHAT, body, headers={"x-request-id": "mine"}):
        pass
    (line,) = [line for line in log_lines if line["event"] == "request"]
    assert line["request_id"] == "mine"
    assert (line["status"], line["method"], line["path"], line["model"]) == (200, "POST", CHAT, "tiny")
    assert (line["completion_tokens"], line["cached_tokens"]) == (14, 3)
    assert line["prompt_tokens"] == len("user: the secret prompt\nassistant: ")
    assert (line["ignored_fields"], line["clamped"]) == ("odd", "max_tokens=477")
    assert line["duration_ms"] > 0
    assert "secret" not in json.dumps(log_lines)


async def test_refused_requests_leave_the_reason_but_never_the_prompt(gateway, log_lines):
    await gateway.answer(CHAT, chat_body("please refuse me"))
    await gateway.answer(CHAT, chat_body(temperature=3))
    assert [line["status"] for line in log_lines] == [400, 400]
    assert log_lines[1]["error"] == "`temperature` must be at most 2, not 3."
    assert "refuse me" not in json.dumps(log_lines)


async def test_a_client_that_left_is_logged_as_such(gateway, log_lines):
    async def script(call):
        await asyncio.Event().wait()
        yield

    gateway.service.script = script
    asking = asyncio.create_task(gateway.chat())
    await until(lambda: gateway.service.open)
    asking.cancel()
    await until(lambda: log_lines)
    assert log_lines[0]["status"] == 499
    assert None not in log_lines[0].values()


def test_a_port_in_use_is_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BindError, match=f"Port {port} on 127.0.0.1 is in use"):
            bind(GatewaySettings(port=port))


def test_a_host_that_is_not_here_is_one_clear_line():
    with pytest.raises(BindError, match=r"203\.0\.113\.7"):
        bind(GatewaySettings(host="203.0.113.7", port=0))
    with pytest.raises(BindError, match=r"no-such-host\.invalid"):
        bind(GatewaySettings(host="no-such-host.invalid", port=0))


def test_every_address_of_a_name_is_bound_on_one_port():
    sockets = bind(GatewaySettings(host="localhost", port=0))
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        assert all(url.startswith("http://") for url in urls(sockets))
    finally:
        for sock in sockets:
            sock.close()


SERVER = """
    import sys
    sys.path.insert(0, {tests!r})
    from fake_service import FakeService
    from helix_gateway.gateway.app import create_app
    from helix_gateway.gateway.addresses import BindError, bind
    from helix_gateway.gateway.server import run
    from helix_gateway.gateway.settings import GatewaySettings
    settings = GatewaySettings(port={port})
    try:
        sockets = bind(settings)
    except BindError as error:
        sys.exit(str(error))
    app = create_app(settings, {{"tiny": FakeService()}})
    async def start():
        pass
    {more}
    sys.exit(run(app, settings, sockets, start))
"""

LOADING_FOREVER = """
    import asyncio
    async def tidy(app):
        yield
        print("tidied up", flush=True)
    app.cleanup_ctx.append(tidy)
    async def start():
        print("loading", flush=True)
        await asyncio.Event().wait()
"""

FAILING_TO_LOAD = """
    async def start():
        raise SystemExit("helix: no such model")
"""


def start_server(port, more=""):
    code = textwrap.dedent(SERVER.format(tests=str(Path(__file__).parent), port=port, more=more.lstrip()))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_server_says_where_it_listens_and_stops_when_told_to():
    with start_server(0) as server:
        line = server.stdout.readline()
        assert line.startswith("Helix listens on http://127.0.0.1:")
        with start_server(int(line.rsplit(":", 1)[1])) as second:
            out, err = second.communicate(timeout=20)
        assert (second.returncode, out) == (1, "")
        assert err.count("\n") == 1
        assert "in use" in err
        server.terminate()
        assert server.wait(timeout=20) == 0


def test_a_server_that_is_still_loading_stops_when_told_to():
    with start_server(0, LOADING_FOREVER) as server:
        assert server.stdout.readline() == "loading\n"
        server.terminate()
        out, _ = server.communicate(timeout=20)
        assert (server.returncode, out) == (0, "tidied up\n")


def test_a_server_whose_model_cannot_be_loaded_ends_with_the_reason():
    with start_server(0, FAILING_TO_LOAD) as server:
        out, err = server.communicate(timeout=20)
        assert (server.returncode, out) == (1, "")
        assert err.splitlines()[-1] == "helix: no such model"


async def test_a_stream_whose_client_closes_once_it_has_all_is_no_client_that_left(gateway, log_lines, monkeypatch):
    async def slowly(*_tasks):
        await asyncio.sleep(5)

    monkeypatch.setattr("helix_gateway.gateway.sse.end", slowly)  # what is left to do after the last event
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    body = json.dumps({"prompt": "a", "max_tokens": 3, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    await reader.readuntil(b"data: [DONE]\n\n")
    writer.transport.abort()
    await until(lambda: log_lines)
    assert log_lines[0]["status"] == 200
