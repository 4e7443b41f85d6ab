"""What a request must be for the engine to take it, whoever sends it: compiled code trusts every id from here on.

The gateway says more about the same things, with JSON paths; a program that calls the library comes here first.
"""

from collections.abc import Iterable

from helix_gateway.core.errors import InvalidRequestError
from helix_gateway.core.request import Request

_HOTTEST = 100.0
"""A library may go beyond OpenAI's 2, but not to where a float32 ends."""


def check_request(request: Request, vocab_size: int) -> None:
    """Raise InvalidRequestError for what would make a step fail, or hold it up for ever."""
    params = request.sampling
    if not request.prompt_token_ids:
        raise InvalidRequestError("The prompt is empty; it needs at least one token.", param="prompt")
    _check_ids("prompt", request.prompt_token_ids, vocab_size)
    _check_ids("prediction", request.prediction_token_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias, vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    for word in params.bad_words:
        if not word:
            raise InvalidRequestError("A bad word has no token.", param="bad_words")
        _check_ids("bad_words", word, vocab_size)
    for name, value, least in (("n", params.n, 1), ("max_tokens", params.max_tokens, 1), ("top_k", params.top_k, 1)):
        if value is not None and value < least:
            raise InvalidRequestError(f"{name} must be at least {least}, not {value}.", param=name)
    if not 0 <= params.temperature <= _HOTTEST:
        message = f"temperature must be between 0 and {_HOTTEST:g}, not {params.temperature}."
        raise InvalidRequestError(message, param="temperature")
    if not 0 < params.top_p <= 1:
        raise InvalidRequestError(f"top_p must be above 0 and at most 1, not {params.top_p}.", param="top_p")
    if not 0 <= params.min_p <= 1:
        raise InvalidRequestError(f"min_p must be between 0 and 1, not {params.min_p}.", param="min_p")
    if not params.repetition_penalty > 0:
        message = f"repetition_penalty must be above 0, not {params.repetition_penalty}."
        raise InvalidRequestError(message, param="repetition_penalty")


def _check_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"{name} holds the token id {token}; ids go from 0 to {vocab_size - 1}.", param=name
            )
