"""What a client asked, in tokens: the words that cross from the service to the engine.

Knows nothing about text (stop strings, chat templates) or HTTP: by the time a Request exists, bounds are
checked and every default is filled in.  msgspec Structs, since they cross a process boundary as they are.
"""

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one Request are chosen; the defaults are OpenAI's.

    The order in which options apply is fixed: repetition, presence and frequency penalties, logit bias,
    bans (bad words, min_tokens), temperature, min-p, top-k, top-p, noise.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that the output holds."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the output holds it."""
    logit_bias: dict[int, float] = {}
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences of which the last token is banned where the others precede it."""
    min_tokens: int = 0
    max_tokens: int | None = None
    """None: up to the end of the context."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    """64 bits; whoever builds the Request draws one where the client gave none."""
    logprobs: int | None = None
    """Alternatives reported with each output token (0: the sampled token's alone); None: no logprobs."""
    prompt_logprobs: int | None = None
    n: int = 1


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and the ``n`` answers wanted for it."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    """Lower is served first, and preempted last."""
    cache_salt: str = ""
    """Prefixes are shared only between requests of equal salt."""
    prediction_token_ids: list[int] = []
    """What the client expects the answer to be: drafted from, never believed."""
    max_depth: int | None = None
    """Cap on draft tokens a step; None: the engine's own choice, 0: no speculation."""
