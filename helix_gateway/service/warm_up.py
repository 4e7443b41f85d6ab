"""Tiny requests that make an engine do once whatever requests may make it do, before anybody waits for an answer.

Knows nothing about models.
"""

from typing import Any

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.engine.engine import Engine

_MOST_TOKENS = 4


def warm_up(engine: Engine[Any]) -> None:
    """Serve a request that repeats itself, and a greedy one, so that no client waits for kernels to be compiled, or loaded.

    Raises:
        ModelLoadError: the engine cannot serve them.
    """
    prompt = [0] * min(_MOST_TOKENS, engine.max_model_len - 1)
    most = min(_MOST_TOKENS, engine.max_model_len - len(prompt))
    drawn = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=most, ignore_eos=True, logprobs=1, n=2)
    _serve(engine, Request(request_id="warm-up", prompt_token_ids=prompt, prediction_token_ids=prompt, sampling=drawn))
    # Rows that are greedy and that nothing edits have code of their own, which none of the others calls.
    greedy = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    _serve(engine, Request(request_id="greedy-warm-up", prompt_token_ids=prompt, sampling=greedy))


def _serve(engine: Engine[Any], request: Request) -> None:
    engine.submit(request)
    while engine.has_work():
        for event in engine.step():
            if event.error is not None:
                raise ModelLoadError(f"The model loads but does not run: {event.error}")
