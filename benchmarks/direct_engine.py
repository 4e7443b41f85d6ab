"""An engine of no model that speaks HTTP itself: what `gateway_bench.py` measures is measured here without the gateway.

Each request gets its first chunk at once and one more at every step, in the gateway's shape and size; of the request nothing
is looked at but where it ends.  Started by `gateway_bench.py`; tells its port on its standard output.
"""

import asyncio
import os
import sys

from helix_gateway.gateway.server import run_event_loop

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"x-request-id: req_00000000000000000000000000000000\r\nTransfer-Encoding: chunked\r\n\r\n"
)
EVENT = (
    b'data: {"id":"chatcmpl-00000000000000000000000000000000","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"fake","system_fingerprint":"fp_0000000000","choices":[{"index":0,"delta":{"content":" word"},'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)


def chunk(payload):
    return b"%x\r\n%b\r\n" % (len(payload), payload)


class Server(asyncio.Protocol):
    """One connection, which asks for one stream after another."""

    def __init__(self, streaming, max_tokens):
        self._streaming = streaming
        self._max_tokens = max_tokens
        self._asked = b""
        self._left = 0

    def connection_made(self, transport):
        self._transport = transport

    def connection_lost(self, error):
        self._streaming.discard(self)

    def data_received(self, data):
        self._asked += data
        head, end, body = self._asked.partition(b"\r\n\r\n")
        if end and len(body) >= int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]):
            self._asked = b""
            self._left = self._max_tokens
            self._transport.write(HEAD + chunk(EVENT + EVENT))
            self._count()
            if self._left:
                self._streaming.add(self)

    def step(self):
        self._transport.write(chunk(EVENT))
        self._count()

    def _count(self):
        self._left -= 1
        if not self._left:
            self._transport.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            self._streaming.discard(self)


async def serve(step_s, max_tokens):
    streaming = set()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Server(streaming, max_tokens), "127.0.0.1", 0)
    sys.stdout.write(f"listens on http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    beat_s = loop.time()
    while True:
        beat_s = max(beat_s + step_s, loop.time())
        await asyncio.sleep(beat_s - loop.time())
        for connection in list(streaming):
            connection.step()


if __name__ == "__main__":
    run_event_loop(serve(float(os.environ["HELIX_FAKE_STEP_MS"]) / 1e3, int(sys.argv[1])))
