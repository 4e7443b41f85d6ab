"""The real model in its file's own four bits and in int8: the same text with speculation, without it, alone and in a batch."""

import pytest

from helix_gateway import HelixEngine

PROMPTS = [
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n    return",
    "One, two, three, four. One, two, three, four. One, two,",
    "The capital of France is",
]
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 7}


@pytest.fixture(scope="module", params=["auto", "int8"])
def engine(smollm2_path, request):
    """One that always verifies four drafts at least, where there are as many."""
    with HelixEngine(
        smollm2_path, quantization=request.param, speculation="suffix", min_depth=4, kv_cache_memory_bytes=256 << 20
    ) as made:
        yield made


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_speculation_cannot_be_seen(engine, options):
    drafted = engine.generate(PROMPTS, max_tokens=32, **options)
    plain = engine.generate(PROMPTS, max_tokens=32, max_depth=0, **options)
    assert [result.text for result in drafted] == [result.text for result in plain]
    assert sum(result.metrics.accepted_tokens for result in drafted) > 0
    assert sum(result.metrics.accepted_tokens for result in plain) == 0


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_prediction_cannot_be_seen_be_it_right_or_half_wrong(engine, options):
    plain = engine.generate(PROMPTS[2], max_tokens=32, max_depth=0, **options).token_ids
    half = [*plain[:18], *plain[:17:-1]]
    assert half != plain
    # A salt of each one's own: a draft from an answer that the engine remembers would be as good.
    right, wrong = (
        # Always four drafts, so that it is no matter of time whether a window reaches from right tokens into wrong ones.
        engine.generate(PROMPTS[2], max_tokens=32, max_depth=4, prediction=ids, cache_salt=salt, **options)
        for ids, salt in ((plain, f"right {options}"), (half, f"half wrong {options}"))
    )
    assert right.token_ids == wrong.token_ids == plain
    assert right.metrics.accepted_prediction_tokens > wrong.metrics.accepted_prediction_tokens >= 8
    assert wrong.metrics.rejected_prediction_tokens > 0


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_company_cannot_be_seen(engine, options):
    together = engine.generate(PROMPTS, max_tokens=24, **options)
    alone = [engine.generate(prompt, max_tokens=24, **options) for prompt in PROMPTS]
    assert [result.text for result in together] == [result.text for result in alone]


def test_it_still_knows_the_capital_of_france(engine):
    assert "Paris" in engine.generate(PROMPTS[2], max_tokens=6, temperature=0).text
