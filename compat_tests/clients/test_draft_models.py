"""SmolLM2 with draft models made from it: the answers are its own, greedy and drawn."""

import pytest

from helix_gateway import HelixEngine
from scripts.make_draft_models import make_draft_models

QUESTIONS = ["What is the capital of France?", "Tell a short story about a cat.", "Count from one to twenty."]
OPTIONS = {"max_tokens": 32, "seed": 5}
DTYPES = ["float32", "auto"]
"""Of these the second keeps the file's own four bits, and its drafts' weights and all keys and values in int8."""


@pytest.fixture(scope="module")
def draft_models(smollm2_path, tmp_path_factory):
    made = make_draft_models(smollm2_path, tmp_path_factory.mktemp("drafts"), ["rounded", "shallow"])
    return {folder.name: str(folder) for folder in made}


def answers(model, **settings):
    with HelixEngine(model, kv_cache_memory_bytes=256 << 20, **settings) as engine:
        prompts = [engine.tokenizer.render_chat([{"role": "user", "content": text}]) for text in QUESTIONS]
        return {temperature: engine.generate(prompts, temperature=temperature, **OPTIONS) for temperature in (0.0, 0.8)}


@pytest.fixture(scope="module")
def plain(smollm2_path):
    return {dtype: answers(smollm2_path, speculation="off", dtype=dtype) for dtype in DTYPES}


@pytest.mark.parametrize(
    "kind, dtype, least_share",
    [
        ("rounded", "float32", 0.25),
        ("shallow", "float32", 0.0),
        ("rounded", "auto", 0.25),
        pytest.param("shallow", "auto", 0.0, marks=pytest.mark.deep),
    ],
)
def test_a_draft_model_changes_no_answer_and_is_right_as_often_as_it_should(
    smollm2_path, plain, draft_models, kind, dtype, least_share
):
    drafted = answers(
        smollm2_path, draft_model=draft_models[kind], speculation="model", min_depth=3, max_depth=3, dtype=dtype
    )
    for temperature, results in drafted.items():
        assert [r.token_ids for r in results] == [r.token_ids for r in plain[dtype][temperature]]
        proposed, accepted = (
            sum(getattr(r.metrics, name) for r in results) for name in ("draft_tokens", "accepted_tokens")
        )
        print(
            f"{kind}, {dtype} at {temperature}: {accepted} of {proposed} accepted, {3 * accepted / proposed:.2f} of three a step"
        )
        assert accepted >= least_share * proposed
