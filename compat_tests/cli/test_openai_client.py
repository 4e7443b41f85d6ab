"""The client of the commands against servers that are not Helix: what they send that is unlike ours."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from helix_gateway.cli.openai_client import OpenAIClient, ServerError


@asynccontextmanager
async def server(*chunks, status=200, models=None):
    """Answers every POST with these bytes, a write each, and /models with this JSON."""
    seen = []

    async def post(request):
        seen.append((request.path, request.headers.get("Authorization"), await request.read()))
        response = web.StreamResponse(status=status, headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0.002)
        return response

    async def get_models(request):
        return web.json_response(models)

    app = web.Application()
    app.router.add_post("/{path:.*}", post)
    app.router.add_get("/v1/models", get_models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with OpenAIClient(f"http://127.0.0.1:{runner.addresses[0][1]}", "secret") as client:
            client.seen = seen
            yield client
    finally:
        await runner.cleanup()


async def read(client, api="chat"):
    return [piece async for piece in client.stream(api, b"{}")]


async def test_events_come_however_they_are_cut_and_whichever_line_ends_they_have():
    whole = (
        b': hello\r\n\r\nevent: x\r\ndata: {"choices":[{"delta":{"content":"Gr\xc3\xbc"}}]}\r\n\r\n'
        b'data:{"choices":[{"delta":{"reasoning_content":"hm"},"finish_reason":null}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
    )
    for size in (1, 7, 1000):
        async with server(*(whole[place : place + size] for place in range(0, len(whole), size))) as client:
            pieces = await read(client)
        assert [(piece.text, piece.reasoning) for piece in pieces] == [("Grü", ""), ("", "hm"), ("", "")]
        assert (pieces[-1].usage.prompt_tokens, pieces[-1].usage.cached_tokens) == (3, 0)
    assert client.seen[0][:2] == ("/v1/chat/completions", "Bearer secret")


async def test_a_server_that_ends_a_connection_after_its_answer_costs_no_request():
    connections = []

    async def answer(reader, writer):
        connections.append(await reader.readuntil(b"\r\n\r\n"))
        data = b"data: [DONE]\n\n"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        # Says nothing of closing, as llama.cpp's does, and closes.
        writer.write(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as served:
        url = f"http://127.0.0.1:{served.sockets[0].getsockname()[1]}"
        async with OpenAIClient(url) as client:
            for _ in range(5):
                assert await read(client) == []
    assert len(connections) == 5


async def test_plain_completions_are_read_too():
    async with server(b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n') as client:
        (piece,) = await read(client, "completions")
    assert (piece.text, piece.finish_reason) == ("a", "stop")


@pytest.mark.parametrize(
    "body,status,said",
    [
        (b'{"error": {"message": "Too many.", "type": "x"}}', 429, "429: Too many."),
        (b'{"error": "Plain words."}', 500, "500: Plain words."),
        (b'{"detail": "Not ours."}', 404, "Not ours."),
        (b"<html>Bad gateway</html>", 502, "502: <html>Bad gateway"),
        (b"", 503, "503: no reason given"),
        (b'data: {"error": {"message": "Died."}}\n\n', 200, "Died."),
        (b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', 200, "broke off"),
        (b"data: rubbish\n\n", 200, "not a chunk"),
    ],
)
async def test_trouble_is_told_in_the_server_s_words(body, status, said):
    async with server(body, status=status) as client:
        with pytest.raises(ServerError) as trouble:
            await read(client)
    assert said in str(trouble.value)
    assert trouble.value.status == (status if status != 200 else None)


@pytest.mark.parametrize(
    "models,said",
    [
        ({"data": []}, "serves no model"),
        ({"data": [{"id": "a"}, {"id": "b/c"}]}, "name one of them: a, b/c"),
        ({"models": []}, "does not answer as OpenAI"),
        ([], "does not answer as OpenAI"),
    ],
)
async def test_which_model_is_asked_for_only_where_there_is_a_choice(models, said):
    async with server(models=models) as client:
        with pytest.raises(ServerError, match=said):
            await client.only_model(None)
        assert await client.only_model("mine") == "mine"


async def test_the_only_model_need_not_be_named():
    async with server(models={"data": [{"id": "org/one"}]}) as client:
        assert await client.only_model(None) == "org/one"
