"""A tiny request that makes an engine do once whatever requests may make it do, before anybody waits for an answer.

Knows nothing about models.
"""

from typing import Any

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.engine.engine import Engine

_MOST_TOKENS = 4


def warm_up(engine: Engine[Any]) -> None:
    """Serve a request that repeats itself, so that no client waits for kernels to be compiled, or loaded.

    Raises:
        ModelLoadError: the engine cannot serve it.
    """
    prompt = [0] * min(_MOST_TOKENS, engine.max_model_len - 1)
    most = min(_MOST_TOKENS, engine.max_model_len - len(prompt))
    sampling = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=most, ignore_eos=True, logprobs=1, n=2)
    engine.submit(
        Request(request_id="warm-up", prompt_token_ids=prompt, prediction_token_ids=prompt, sampling=sampling)
    )
    while engine.has_work():
        for event in engine.step():
            if event.error is not None:
                raise ModelLoadError(f"The model loads but does not run: {event.error}")
