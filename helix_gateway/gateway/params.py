"""From checked wire fields to what the engine is asked: SamplingParams, StopStrings, one call a prompt.

Here are the bounds that only the model knows (its vocabulary, its context).  Knows nothing about HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.gateway.errors import ApiError
from helix_gateway.gateway.prompts import Prompt
from helix_gateway.gateway.registry import ServedModel
from helix_gateway.gateway.schemas.common import GenerationRequest
from helix_gateway.service.api import GenerationCall, StopStrings

SEED_RANGE = 2**64


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a route asks for beside the shared fields."""

    token_limit: int | None
    """Tokens of one answer that the client asked for; 0: nothing but what is known of the prompt."""
    default_limit: int | None = None
    """What bounds an answer where the client asked for no number; None: the end of the context."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prediction_token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that one HTTP request asks of the engine."""

    calls: list[GenerationCall]
    """One a prompt."""
    num_choices: int
    """Sequences generated for each prompt."""
    seed: int
    clamped_to: int | None
    """The token limit of the prompt that has least room, where that is less than was asked."""
    prompt_only: bool
    """The engine has no answer without a token: one is generated and not shown."""

    @property
    def asks_prompt_logprobs(self) -> bool:
        """Whether the first delta of each prompt brings its logprobs."""
        return self.calls[0].request.sampling.prompt_logprobs is not None


def make_plan(
    reply_id: str, served: ServedModel, body: GenerationRequest, prompts: Sequence[Prompt], wanted: Wanted
) -> Plan:
    """Fill in every default and check what only the model can.

    Prompt i of several draws from seed + i: equal prompts then get different answers, and the same ones again.

    Raises:
        ApiError: 400.
    """
    sampling = _sampling(served, body, wanted)
    _refuse_too_many(len(prompts), sampling.n, served.service.max_sequences)
    stop = StopStrings(
        strings=tuple(body.stop),
        include_in_output=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
    )
    predicted = list(wanted.prediction_token_ids)
    calls = [
        GenerationCall(
            request=_request(f"{reply_id}-{index}", served, body, sampling, prompt, predicted, index), stop=stop
        )
        for index, prompt in enumerate(prompts)
    ]
    limits = [call.request.sampling.max_tokens or 0 for call in calls]
    clamped = wanted.token_limit is not None and min(limits) < wanted.token_limit
    return Plan(calls, sampling.n, sampling.seed, min(limits) if clamped else None, wanted.token_limit == 0)


def _refuse_too_many(num_prompts: int, num_choices: int, most: int) -> None:
    if num_prompts > 1 and num_prompts * num_choices > most:
        total = f"asks for {num_prompts * num_choices} answers ({num_prompts} prompts, {num_choices} answers to each)"
        raise _wrong("prompt", f"{total}; at most {most} fit into one request. Send fewer prompts, or a smaller `n`")


def _request(
    request_id: str,
    served: ServedModel,
    body: GenerationRequest,
    sampling: SamplingParams,
    prompt: Prompt,
    predicted: list[int],
    index: int,
) -> Request:
    room = served.service.max_model_len - len(prompt.token_ids)
    limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt.token_ids,
        sampling=msgspec.structs.replace(
            sampling,
            max_tokens=limit,
            min_tokens=min(limit, sampling.min_tokens),
            seed=(sampling.seed + index) % SEED_RANGE,
        ),
        priority=body.priority,
        cache_salt=body.cache_salt,
        prediction_token_ids=predicted,
        max_depth=_max_depth(body.speculation),
    )


def _sampling(served: ServedModel, body: GenerationRequest, wanted: Wanted) -> SamplingParams:
    if wanted.token_limit is not None and body.min_tokens > wanted.token_limit:
        raise _wrong("min_tokens", f"must be at most `max_tokens` ({wanted.token_limit}), not {body.min_tokens}")
    ranked = body.best_of is not None and body.best_of > body.n
    return SamplingParams(
        temperature=body.temperature,
        top_k=body.top_k if body.top_k > 0 else None,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(body.logit_bias, served.service.vocab_size),
        bad_words=_bad_words(body.bad_words, served),
        min_tokens=body.min_tokens,
        max_tokens=wanted.default_limit if wanted.token_limit is None else max(1, wanted.token_limit),
        stop_token_ids=_stop_token_ids(body.stop_token_ids, served.service.vocab_size),
        ignore_eos=body.ignore_eos,
        seed=served.service.draw_seed() if body.seed is None else body.seed % SEED_RANGE,
        logprobs=0 if ranked and wanted.logprobs is None else wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        n=body.best_of or body.n,
    )


def _max_depth(speculation: Literal["off"] | int | None) -> int | None:
    return 0 if speculation == "off" else speculation


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    if not bias:
        return {}
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise _wrong(f"logit_bias.{key[:40]}", f"must be named by a token id from 0 to {vocab_size - 1}")
    return {int(key): value for key, value in bias.items()}


def _stop_token_ids(token_ids: list[int], vocab_size: int) -> tuple[int, ...]:
    for index, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            raise _wrong(f"stop_token_ids[{index}]", f"must be a token id from 0 to {vocab_size - 1}")
    return tuple(token_ids)


def _bad_words(words: list[str], served: ServedModel) -> tuple[tuple[int, ...], ...]:
    """Each word as it stands at the start of a text and as it stands after a space: they are different tokens."""
    if not words:
        return ()
    encode = served.service.tokenizer.encode
    spellings = (spelling for word in words for spelling in (word, " " + word.lstrip()))
    banned = (tuple(encode(spelling, add_special_tokens=False)) for spelling in spellings)
    return tuple(dict.fromkeys(ids for ids in banned if ids))


def _wrong(path: str, problem: str) -> ApiError:
    return ApiError.bad_request(f"`{path}` {problem}.", param=path)
