"""Pages in browsers: which origins may use the server, preflights on every route, rebinding refused."""

import pytest
from conftest import chat_body, running

from helix_gateway.gateway.origins import host_allowed, is_loopback, origin_allowed

CHAT = "/v1/chat/completions"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless-os"}

LET_IN = [
    "http://localhost:3000",
    "https://localhost",
    "http://127.0.0.1:8080",
    "http://[::1]:5173",
    "http://tauri.localhost",
    "app://obsidian.md",
    "tauri://localhost",
    "file://",
    "vscode-webview://0123abc",
]
KEPT_OUT = [
    "https://example.com",
    "http://localhost.example.com",
    "http://127.0.0.1.example.com",
    "null",
    "http://192.168.1.2:3000",
    "chrome-extension://abc",
    "https://[broken",
    "",
]


@pytest.mark.parametrize("origin", LET_IN)
async def test_loopback_pages_and_desktop_apps_are_let_in(gateway, origin):
    async with gateway.post(CHAT, chat_body(), headers={"Origin": origin}) as response:
        assert response.status == 200
        assert response.headers["Access-Control-Allow-Origin"] == origin
        assert response.headers["Vary"] == "Origin"
        exposed = response.headers["Access-Control-Expose-Headers"]
        assert all(name in exposed for name in ("x-request-id", "retry-after", "x-helix-ignored-fields"))


@pytest.mark.parametrize("origin", KEPT_OUT)
async def test_web_sites_cannot_drive_the_model(gateway, origin):
    async with gateway.post(CHAT, chat_body(), headers={"Origin": origin}) as response:
        assert response.status == 403
        assert "Access-Control-Allow-Origin" not in response.headers
        assert (await response.json())["error"]["code"] == "origin_not_allowed"
    async with gateway.session.options(gateway.url + CHAT, headers={"Origin": origin, **PREFLIGHT}) as response:
        assert response.status == 403
        assert "Access-Control-Allow-Origin" not in response.headers
    assert gateway.service.calls == []


@pytest.mark.parametrize("path", [CHAT, "/models", "/health", "/", "/v1/nothing/here"])
async def test_preflights_are_answered_on_every_route_without_a_key(path):
    async with running(api_keys=("secret",)) as gateway:
        headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Private-Network": "true", **PREFLIGHT}
        async with gateway.session.options(gateway.url + path, headers=headers) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
            assert "POST" in response.headers["Access-Control-Allow-Methods"]
            assert response.headers["Access-Control-Allow-Headers"] == PREFLIGHT["Access-Control-Request-Headers"]
            assert response.headers["Access-Control-Allow-Private-Network"] == "true"
            assert await response.read() == b""


async def test_what_is_cached_without_a_page_is_not_handed_to_one(gateway):
    async with gateway.get("/v1/models") as response:
        assert response.headers["Vary"] == "Origin"


async def test_errors_can_be_read_by_the_page(gateway):
    async with gateway.post(CHAT, b"{", headers={"Origin": "http://localhost"}) as response:
        assert response.status == 400
        assert response.headers["Access-Control-Allow-Origin"] == "http://localhost"


async def test_streams_can_be_read_by_the_page(gateway):
    async with gateway.post(CHAT, chat_body(stream=True), headers={"Origin": "http://localhost"}) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "http://localhost"


async def test_origins_named_by_the_operator_are_let_in():
    async with running(allowed_origins=("https://chat.example.com",)) as gateway:
        for origin, status in (("https://chat.example.com", 200), ("https://other.example.com", 403)):
            async with gateway.post(CHAT, chat_body(), headers={"Origin": origin}) as response:
                assert response.status == status
    async with (
        running(allowed_origins=("*",)) as gateway,
        gateway.post(CHAT, chat_body(), headers={"Origin": "https://any.example"}) as response,
    ):
        assert response.status == 200


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("my.localhost", 200),
        ("host.docker.internal:8000", 200),
        ("rebound.example.com", 403),
        ("localhost.example.com", 403),
        ("192.168.1.2", 403),
    ],
)
async def test_a_loopback_server_answers_only_to_loopback_names(gateway, host, status):
    for path in ("/v1/models", "/"):
        async with gateway.get(path, headers={"Host": host}) as response:
            assert response.status == status
            if status == 403:
                assert (await response.json())["error"]["code"] == "host_not_allowed"


async def test_the_operator_can_name_hosts():
    async with (
        running(allowed_hosts=("llm.example.com",)) as gateway,
        gateway.get("/v1/models", headers={"Host": "LLM.example.com:443"}) as response,
    ):
        assert response.status == 200


def test_servers_on_other_addresses_do_not_check_hosts():
    assert host_allowed("anything.example.com", "0.0.0.0", ())
    assert not host_allowed("anything.example.com", "127.0.0.1", ())
    assert host_allowed("anything.example.com", "localhost", ("*",))
    assert host_allowed(None, "127.0.0.1", ())


def test_a_page_that_the_server_itself_served_may_use_it():
    assert origin_allowed("http://192.168.1.2:8000", "192.168.1.2:8000", ())
    assert not origin_allowed("http://192.168.1.2:3000", "192.168.1.2:8000", ())
    for name in ("gpu-box:8000", "gpu-box.local:8000", "[fe80::1]:8000"):
        assert origin_allowed(f"http://{name}", name, ())


def test_a_page_whose_name_was_rebound_to_this_server_may_not_use_it():
    assert not origin_allowed("http://evil.example.com:8000", "evil.example.com:8000", ())
    assert origin_allowed("https://llm.example.com", "llm.example.com", (), ("LLM.example.com",))


@pytest.mark.parametrize("path", ["/generate", "/v1/generate/stream", "/metrics", "/openapi.json", "/docs"])
async def test_every_route_answers_preflights_and_its_errors_can_be_read(path):
    async with running(api_keys=("secret",), rate_limit=1) as gateway:
        page = {"Origin": "app://obsidian.md"}
        async with gateway.session.options(gateway.url + path, headers={**page, **PREFLIGHT}) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == page["Origin"]
        for headers in (page, {**page, "Authorization": "Bearer wrong"}):
            async with gateway.session.put(gateway.url + path, headers=headers) as response:
                assert response.status in (401, 405)
                assert response.headers["Access-Control-Allow-Origin"] == page["Origin"]
                assert "x-request-id" in response.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.3.2.1", "::1", "[::1]", "a.b.localhost"])
def test_loopback_names(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "localhost.com", "128.0.0.1", "", "example.com"])
def test_other_names(host):
    assert not is_loopback(host)
