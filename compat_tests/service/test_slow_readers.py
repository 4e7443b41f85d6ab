"""Clients that do not read, through a real socket and a real engine: bounded memory, and nobody else waits."""

import asyncio
import contextlib
import json
import socket
import time

import aiohttp
import pytest

from compat_tests.text.little_tokenizers import save_folder, train_byte_level
from compat_tests.tiny_models import make_model
from helix_gateway.core.errors import SlowReaderError
from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.gateway.addresses import bind
from helix_gateway.gateway.app import create_app
from helix_gateway.gateway.server import listening
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.service import backlog
from helix_gateway.service.api import GenerationCall
from helix_gateway.service.in_process import InProcessService
from helix_gateway.service.settings import EngineSettings

pytestmark = pytest.mark.alone

BOUND_BYTES = 200_000
KERNEL_BUFFER_BYTES = 16 * 1024
CONTEXT = 8192


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_byte_level()
    options = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    _, model = make_model("llama", options, 0)
    model.save_pretrained(folder)
    save_folder(tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_service(tiny_folder):
    made = InProcessService(EngineSettings(model_path=tiny_folder, kv_cache_memory_bytes=64 << 20))
    yield made
    made.close()


@pytest.fixture
def small_bound(monkeypatch):
    monkeypatch.setattr(backlog, "MAX_REQUEST_BYTES", BOUND_BYTES)


async def until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def gateway(service):
    settings = GatewaySettings(port=0)
    sockets = bind(settings)
    for sock in sockets:  # connections inherit it; the kernel's own choice holds megabytes
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BUFFER_BYTES)
    async with listening(create_app(settings, {"m": service}), settings, sockets) as urls:
        yield int(urls[0].rsplit(":", 1)[1])


async def silent_client(port, **fields):
    """A connection that asks for a long stream and reads nothing of it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BUFFER_BYTES)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    body = json.dumps({"prompt": "Once", "max_tokens": 8000, "ignore_eos": True, "stream": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(sock, head.encode() + body)
    return sock


async def read_all(sock):
    reader, writer = await asyncio.open_connection(sock=sock)
    text = b""
    while b"\r\n0\r\n" not in text[-20:] and (more := await reader.read(65536)):
        text += more
    writer.close()
    return text.decode()


def blocks_held(service):
    return service.host.engine.cache.pool.num_referenced


async def test_who_does_not_read_is_cut_off_at_the_bound_and_told_when_it_does(tiny_service, small_bound):
    async with gateway(tiny_service) as port:
        sock = await silent_client(port, logprobs=20)
        await until(lambda: blocks_held(tiny_service))
        await until(lambda: not blocks_held(tiny_service))
        text = await read_all(sock)
    assert "[DONE]" not in text
    error = json.loads(text.rsplit("data: ", 1)[1].split("\n\n")[0])["error"]
    assert error["code"] == "read_too_slowly"
    assert "Read faster" in error["message"]


async def test_what_waits_for_a_silent_client_stays_within_the_bound(tiny_service, small_bound, monkeypatch):
    sizes = []
    put = backlog.Backlog.put

    def watched(self, event):
        put(self, event)
        sizes.append(self.num_bytes)

    monkeypatch.setattr(backlog.Backlog, "put", watched)
    async with gateway(tiny_service) as port:
        with await silent_client(port, logprobs=20, n=4):
            await until(lambda: blocks_held(tiny_service))
            await until(lambda: not blocks_held(tiny_service))
    assert BOUND_BYTES / 2 < max(sizes) <= BOUND_BYTES


async def test_an_answer_without_logprobs_waits_whole_for_a_client_that_comes_late(tiny_service):
    async with gateway(tiny_service) as port:
        sock = await silent_client(port, max_tokens=150, n=8, return_token_ids=True)
        await until(lambda: blocks_held(tiny_service))
        await until(lambda: not blocks_held(tiny_service))
        text = await read_all(sock)
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert sum(len(event["choices"][0].get("token_ids", ())) for event in events) == 8 * 150
    assert "[DONE]" in text


async def test_a_silent_client_slows_nobody_and_has_its_blocks_back_when_it_goes(tiny_service):
    body = {"prompt": "Once", "max_tokens": 50, "ignore_eos": True, "temperature": 0, "stream": True}
    async with gateway(tiny_service) as port, aiohttp.ClientSession() as session:

        async def streamed():
            async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
                return [line async for line in response.content if line.startswith(b"data: {")]

        sock = await silent_client(port, logprobs=20)
        await until(lambda: blocks_held(tiny_service))
        held = blocks_held(tiny_service)
        assert len(await asyncio.wait_for(streamed(), 20)) > 1
        await until(lambda: blocks_held(tiny_service) > held)
        sock.close()
        await until(lambda: not blocks_held(tiny_service))


async def test_who_reads_the_service_too_slowly_is_told(tiny_service, small_bound):
    sampling = SamplingParams(max_tokens=8000, ignore_eos=True, logprobs=20)
    call = GenerationCall(request=Request(request_id="slow", prompt_token_ids=[5], sampling=sampling))
    stream = tiny_service.generate(call)
    await anext(stream)
    await until(lambda: not blocks_held(tiny_service))
    with pytest.raises(SlowReaderError):
        async for _ in stream:
            pass
