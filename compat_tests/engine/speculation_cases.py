"""What speculation must not be seen in: every sampling option; and who must not be noticed: every kind of drafter."""

import random
from functools import cache

from hypothesis import strategies as st

from compat_tests.engine.toy import EOS, ONE_GROUP, VOCAB, ScriptedDrafter, alone, drain, logits_after, request
from helix_gateway.engine.acceptance import AcceptanceModel
from helix_gateway.engine.depth import AdaptiveDepth, FixedDepth
from helix_gateway.engine.drafters.suffix import SuffixDrafter
from helix_gateway.engine.drafting import AdaptiveDrafting, AlwaysDrafting
from helix_gateway.engine.step_costs import StepCosts

OPTIONS = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.6},
    "warm": {"temperature": 0.7},
    "top k": {"top_k": 5},
    "top p": {"top_p": 0.8},
    "min p": {"min_p": 0.05},
    "all filters": {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "repetition penalty": {"repetition_penalty": 1.4},
    "presence penalty": {"presence_penalty": 1.1},
    "frequency penalty": {"frequency_penalty": 0.9},
    "greedy penalties": {
        "temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5,
    },
    "bias": {"logit_bias": {3: 2.0, 7: -4.0}},
    "bad words": {"bad_words": ((4,), (5, 6), (7, 8, 9))},
    "least tokens": {"min_tokens": 6, "stop_token_ids": (1, 2, 3)},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
    "several": {"n": 3},
    "stops": {"stop_token_ids": (11, 12, 13)},
    "no end of text": {"ignore_eos": True},
    "one token": {"max_tokens": 1},
    "few tokens": {"max_tokens": 5, "ignore_eos": True},
    "everything": {
        "temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1,
        "presence_penalty": 0.3, "frequency_penalty": 0.4, "logit_bias": {3: 1.0, 9: -1.0}, "bad_words": ((4,), (5, 6)),
        "min_tokens": 4, "stop_token_ids": (11,), "logprobs": 2, "n": 2,
    },
}  # fmt: skip


def wanted_of(each, groups=ONE_GROUP):
    """What a request is answered by itself, without speculation."""
    return as_told(alone(each, groups))


def wanted_of_all(requests, groups=ONE_GROUP):
    """What each of some requests is answered by itself."""
    return {key: told for each in requests for key, told in wanted_of(each, groups).items()}


def as_told(answers):
    """Of answers what must not differ."""
    return {
        key: (a.token_ids, a.logprobs, a.prompt_logprobs, a.last.finish_reason, a.last.stop_reason)
        for key, a in answers.items()
    }


def got_from(engine, requests):
    for each in requests:
        engine.submit(each)
    answers = drain(engine)
    assert engine.cache.pool.num_referenced == 0
    return as_told(answers), answers


FREE = {1: 0.01, 64: 0.0101}
"""Seconds of steps by rows, which cost next to nothing: all that is drafted is verified."""
CHEAP = {1: 0.001, 64: 0.0011}
"""Of a drafting model's forwards."""


def draw_crowd(draw):
    """Up to seven requests of any options, as hypothesis' ``draw`` has it; prompts begin alike, some are equal."""
    dice = random.Random(draw(st.integers(0, 10**6)))
    common = [dice.randrange(6) for _ in range(20)]
    return [
        request(
            f"r{i}",
            common[: dice.choice([0, 9, 20])] + [dice.randrange(6) for _ in range(dice.randrange(1, 25))],
            seed=i,
            max_depth=dice.choice([None, None, 0, 2]),
            priority=dice.randrange(2),
            **{"temperature": 1.0, "max_tokens": dice.randrange(1, 24), **OPTIONS[dice.choice(list(OPTIONS))]},
        )
        for i in range(draw(st.integers(1, 7)))
    ]


def draw_policies(draw, source):
    """(depth policy, drafting policy) for a drafter that computes: one depth throughout, or what pays."""
    acceptance = AcceptanceModel()
    fixed = [(FixedDepth(depth), AlwaysDrafting()) for depth in (1, 5, 7)]
    adaptive = (
        AdaptiveDepth(StepCosts(FREE), max_depth=8, acceptance=acceptance),
        AdaptiveDrafting(StepCosts(FREE), StepCosts(CHEAP), acceptance, source=source),
    )
    return draw(st.sampled_from([*fixed, adaptive]))


def worst(sequence, tokens):
    """Never what a model would say twice."""
    return (tokens[-1] * 7 + 1) % VOCAB


@cache
def least_likely_after(tokens):
    return int(logits_after([tokens]).argmin())


def told(known, mistakes):
    """Drafts what each sequence is known to say, and now and then something else."""

    def draft(sequence, tokens):
        place = len(tokens) - sequence.num_prompt_tokens
        future = known.get(sequence.key, ())
        right = future[place] if place < len(future) else EOS
        wrong = random.Random(hash((sequence.key[1], place))).random() < mistakes
        return (right + 1) % VOCAB if wrong else right

    return ScriptedDrafter(draft)


DRAFTERS = {
    "suffix": lambda known: SuffixDrafter(),
    "always the same": lambda known: ScriptedDrafter(lambda sequence, tokens: 11),
    "seldom right": lambda known: ScriptedDrafter(worst),
    "by chance": lambda known: ScriptedDrafter(lambda sequence, tokens: random.Random(len(tokens)).randrange(VOCAB)),
    "least likely": lambda known: ScriptedDrafter(lambda sequence, tokens: least_likely_after(tuple(tokens))),
    "right": lambda known: told(known, 0.0),
    "right by chance": lambda known: told(known, 0.4),
    "always wrong": lambda known: told(known, 1.0),
}
"""Each is given the tokens that every sequence says, by its key, as far as they are known."""
