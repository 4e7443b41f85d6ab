"""An engine process with no model in it, which speaks the engine's wire.

It gives each request its first token at once and one more at every step: what is left of a request's time is the
gateway's.  Started by `gateway_bench.py` in the real engine's place; the time between steps comes in
``HELIX_FAKE_STEP_MS``.
"""

import os
import time

from helix_gateway.core.event import SequenceMetrics, TokenEvent
from helix_gateway.service import engine_process
from helix_gateway.service.loop import ALIVE_INTERVAL_S
from helix_gateway.service.messages import Alive, Events, Ready, Submit

MAX_MODEL_LEN = 8192
VOCAB_SIZE = 49152
WORDS = range(1000, 9000)
"""Tokens that are ordinary pieces of text in SmolLM2's vocabulary."""


class FakeEngine:
    """Gives each request its first token at once, and one more at every beat after that."""

    def __init__(self, tell, step_s):
        self._tell = tell
        self._step_s = step_s
        self._left = {}

    def run(self, inbox):
        beat_s = time.monotonic()
        while True:
            wait_s = max(0.0, beat_s - time.monotonic()) if self._left else ALIVE_INTERVAL_S
            started = self._obey(inbox.receive(wait_s))
            if started:
                self._tell(Events([self._next_event(request_id) for request_id in started]))
            elif time.monotonic() >= beat_s:
                beat_s = time.monotonic() + self._step_s
                events = [self._next_event(request_id) for request_id in list(self._left)]
                self._tell(Events(events) if events else Alive())

    def _obey(self, commands):
        for command in commands:
            if isinstance(command, Submit):
                request = command.call.request
                self._left[request.request_id] = (request, request.sampling.max_tokens)
            else:
                self._left.pop(command.request_id, None)
        asked = (command.call.request.request_id for command in commands if isinstance(command, Submit))
        return [request_id for request_id in asked if request_id in self._left]

    def _next_event(self, request_id):
        request, left = self._left[request_id]
        self._left[request_id] = (request, left - 1)
        last = left == 1
        if last:
            del self._left[request_id]
        return TokenEvent(
            request_id=request_id,
            index=0,
            token_ids=[WORDS[(left * 7919) % len(WORDS)]],
            finish_reason="length" if last else None,
            metrics=_metrics(request) if last else None,
        )


def _metrics(request):
    return SequenceMetrics(
        queue_time_s=0.0,
        time_to_first_token_s=0.0,
        token_times_s=[0.0] * request.sampling.max_tokens,
        prompt_tokens=len(request.prompt_token_ids),
        output_tokens=request.sampling.max_tokens,
        cached_tokens=0,
    )


def serve(settings, link):
    """In place of the real engine's: told the same way, with nothing behind it."""
    link.tell(Ready(MAX_MODEL_LEN, VOCAB_SIZE))
    FakeEngine(link.tell, float(os.environ["HELIX_FAKE_STEP_MS"]) / 1e3).run(link)


if __name__ == "__main__":
    engine_process._serve = serve
    engine_process.main()
