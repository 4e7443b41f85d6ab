"""Every option with every drafter, alone and among 31 others: token for token what it is without speculation."""

import pytest

from compat_tests.effort import usually
from compat_tests.engine.speculation_cases import DRAFTERS, OPTIONS, as_told, got_from, wanted_of
from compat_tests.engine.speculation_faults import FAULTS
from compat_tests.engine.test_constraints import Pattern
from compat_tests.engine.toy import alone, drain, make_engine, request
from helix_gateway.core.protocols import StopMatch
from helix_gateway.engine.depth import AdaptiveDepth, FixedDepth
from helix_gateway.engine.engine import ChoiceHooks
from helix_gateway.engine.step_costs import StepCosts

FREE = StepCosts({1: 0.01, 64: 0.0101})
"""Rows cost next to nothing, so that all that is drafted is verified."""
PROMPT = [5, 6, 7, 8] * 3
CROWD = 32


class ThreeInARow:
    """A stop condition: ends an answer where a token's id is above those of the two before it, which are so too."""

    def __init__(self):
        self.tokens = []

    def feed(self, token_ids):
        for count, token in enumerate(token_ids, start=1):
            self.tokens.append(token)
            if len(self.tokens) > 2 and self.tokens[-3] < self.tokens[-2] < token:
                return StopMatch(count, "rising")
        return None


HOOKS = {
    "constraint": lambda: ChoiceHooks(constraint=Pattern()),
    "stop condition": lambda: ChoiceHooks(stop=ThreeInARow()),
    "both": lambda: ChoiceHooks(constraint=Pattern(step=2), stop=ThreeInARow()),
}
"""What an option is that other rooms understand."""


def asked(name, option, prompt=PROMPT, seed=7, **others):
    return request(
        name, prompt, **{"max_tokens": 24, "seed": seed, "temperature": 1.0, **OPTIONS.get(option, {}), **others}
    )


def hooks_of(option, each):
    return [HOOKS[option]() for _ in range(each.sampling.n)] if option in HOOKS else ()


def answers_to(engine, cases):
    """Of some (request, option) at once."""
    for each, option in cases:
        engine.submit(each, hooks_of(option, each))
    answers = drain(engine)
    assert engine.cache.pool.num_referenced == 0
    return answers


def without_speculation(each, option):
    return answers_to(make_engine(400, budget=500, enable_prefix_caching=False), [(each, option)])


def known_from(answers):
    return {key: answer.token_ids for key, answer in answers.items()}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("option", [*OPTIONS, *HOOKS])
def test_every_option_alone_gives_the_same_with_any_drafter(drafter, option):
    each = asked("r", option)
    wanted = without_speculation(each, option)
    for policy in (FixedDepth(3), AdaptiveDepth(FREE, max_depth=5)):
        engine = make_engine(drafter=DRAFTERS[drafter](known_from(wanted)), depth_policy=policy, budget=64)
        answers = answers_to(engine, [(each, option)])
        assert as_told(answers) == as_told(wanted)
        if drafter == "always wrong":
            assert sum(answer.last.metrics.accepted_tokens for answer in answers.values()) == 0


def crowd_of(options):
    """Thirty-two requests, every option among them; half of the prompts begin alike, and some stand there twice."""
    for number in range(CROWD):
        option = options[number % len(options)]
        prompt = [5, 6, 7, 8] * (1 + number % 4) + ([] if number % 2 else [number % 50, 3])
        yield asked(f"r{number}", option, prompt, seed=number, priority=number % 3), option


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("depth", [usually(depth, depth == 4) for depth in (1, 2, 4, 7)])
def test_every_option_among_31_others_gives_the_same_while_memory_is_short_and_prefixes_are_found(drafter, depth):
    options = [*OPTIONS, *HOOKS]
    for cases in (list(crowd_of(options)), list(crowd_of(options[::-1]))):
        wanted = {}
        for each, option in cases:
            wanted |= without_speculation(each, option)
        engine = make_engine(
            70,
            budget=100,
            max_num_seqs=CROWD,
            max_model_len=60,
            drafter=DRAFTERS[drafter](known_from(wanted)),
            depth_policy=FixedDepth(depth),
        )
        answers = answers_to(engine, cases)
        assert as_told(answers) == as_told(wanted)
        assert engine.num_preemptions > 0
        measured = [answer.last.metrics for answer in answers.values()]
        assert any(figures.cached_tokens for figures in measured)
        assert any(figures.draft_tokens for figures in measured)
        if "right" in drafter and "seldom" not in drafter:
            assert sum(figures.accepted_tokens for figures in measured) > len(measured)


def test_drafts_that_are_right_are_accepted_with_every_option():
    for name in [*OPTIONS, *HOOKS]:
        each = asked("r", name)
        wanted = without_speculation(each, name)
        engine = make_engine(drafter=DRAFTERS["right"](known_from(wanted)), depth_policy=FixedDepth(4), budget=64)
        metrics = answers_to(engine, [(each, name)])["r", 0].last.metrics
        assert metrics.accepted_tokens >= metrics.output_tokens // 2, name


@pytest.mark.parametrize("left", [1, 2, 3, 4, 5, 6])
def test_an_answer_ends_at_its_last_token_wherever_in_a_window_that_is(left):
    each = asked("r", "no end of text", max_tokens=left)
    wanted = alone(asked("r", "no end of text"))
    engine = make_engine(drafter=DRAFTERS["right"](known_from(wanted)), depth_policy=FixedDepth(4), budget=64)
    (answer,) = got_from(engine, [each])[1].values()
    assert answer.token_ids == wanted["r", 0].token_ids[:left]
    assert answer.last.finish_reason == "length"


@pytest.mark.parametrize("end", ["stop_token_ids", "bias towards the end of text", "stop condition"])
def test_an_end_that_lies_among_accepted_drafts_ends_there(end):
    text = alone(asked("r", "no end of text"))["r", 0].token_ids
    option = end if end in HOOKS else ""
    changes = {
        "stop_token_ids": {"stop_token_ids": (text[2],), "ignore_eos": True},
        "bias towards the end of text": {"logit_bias": {0: 3.0}},
    }.get(end, {"ignore_eos": True})
    each = asked("r", option, **changes)
    wanted = without_speculation(each, option)
    assert wanted["r", 0].last.finish_reason == "stop"
    length = len(wanted["r", 0].token_ids)
    # The end itself is drafted too, and more behind it.
    known = {("r", 0): [*wanted["r", 0].token_ids, 0, *text[length + 1 :]]}
    for depth in (2, 9, 23):
        engine = make_engine(drafter=DRAFTERS["right"](known), depth_policy=FixedDepth(depth), budget=64)
        assert as_told(answers_to(engine, [(each, option)])) == as_told(wanted)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_known_bug_would_be_seen(fault, monkeypatch):
    """By the equality that the tests above ask for, with drafts that are right and with drafts that are often so."""
    option = "frequency penalty"
    each = asked("r", option, ignore_eos=True)
    wanted = wanted_of(each)
    known = {key: tokens for key, (tokens, *_) in wanted.items()}
    drafters = [DRAFTERS[name](known) for name in ("right by chance", "right")]
    FAULTS[fault](monkeypatch)
    differs = [
        got_from(make_engine(drafter=drafter, depth_policy=FixedDepth(3), budget=64), [each])[0] != wanted
        for drafter in drafters
    ]
    assert any(differs)
