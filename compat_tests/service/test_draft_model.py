"""A draft model beside the target, as settings name it: loaded over one pool, or refused in one line."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from compat_tests.tiny_models import make_model
from helix_gateway import HelixEngine
from helix_gateway.core.errors import InvalidRequestError, ModelLoadError
from helix_gateway.service.speculative_config import SpeculativeConfig, read_speculative_config
from helix_gateway.service.tiny_model import write_tiny_model
from scripts.make_draft_models import make_draft_models, round_to_four_bits

PROMPTS = ["once upon a time there was", "a b a b a b", "one"]
OPTIONS = {"max_tokens": 20, "ignore_eos": True, "seed": 3}
WEIGHTS = {"float32": {"dtype": "float32"}, "int8": {}, "int4": {"quantization": "int4"}}
"""Settings under which a float model's weights are kept so; keys and values are int8 beside the last two."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model, draft models made of it, and one of another architecture whose layers have windows."""
    place = tmp_path_factory.mktemp("models")
    target = place / "target"
    target.mkdir()
    write_tiny_model(target)
    made = {path.name: str(path) for path in make_draft_models(str(target), place, ["rounded", "shallow"])}
    _, gemma = make_model("gemma2", {
        "vocab_size": 260, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "sliding_window": 9,
        "max_position_embeddings": 512, "layer_types": ["sliding_attention", "full_attention"],
    }, 0)  # fmt: skip
    windowed = place / "windowed"
    gemma.save_pretrained(windowed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target / name, windowed)
    return {"target": str(target), "windowed": str(windowed), **made}


def answers(folders, **settings):
    with HelixEngine(folders["target"], kv_cache_memory_bytes=4 << 20, **settings) as engine:
        results = engine.generate(PROMPTS, temperature=0.0, **OPTIONS)
        results += engine.generate(PROMPTS, temperature=1.0, presence_penalty=0.5, **OPTIONS)
    tokens = [result.token_ids for result in results]
    return tokens, sum(r.metrics.draft_tokens for r in results), sum(r.metrics.accepted_tokens for r in results)


def test_a_model_made_equal_has_other_weights_and_the_same_logits(folders, tmp_path):
    (equal,) = make_draft_models(folders["target"], tmp_path, ["equal"])
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (folders["target"], equal)]
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        target, made = (model(ids).logits for model in models)
    torch.testing.assert_close(made, target, rtol=1e-4, atol=1e-4)
    before, after = (model.model.layers[0].mlp.down_proj.weight for model in models)
    assert not torch.equal(before, after)


@pytest.fixture(scope="module")
def plain(folders):
    return {weights: answers(folders, speculation="off", **how)[0] for weights, how in WEIGHTS.items()}


def test_the_weights_that_answers_are_compared_for_give_other_answers(plain):
    assert plain["float32"] != plain["int8"] != plain["int4"] != plain["float32"]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["rounded", "shallow", "windowed"])
def test_a_draft_model_changes_no_answer(folders, plain, kind, weights):
    tokens, drafted, accepted = answers(
        folders, draft_model=folders[kind], speculation="model", min_depth=3, max_depth=4, **WEIGHTS[weights]
    )
    assert tokens == plain[weights]
    assert drafted > 60
    # A random model's best tokens are near ties, so that even rounding changes most of them.
    assert kind != "rounded" or accepted > 20


@pytest.mark.parametrize("weights", WEIGHTS)
def test_drafts_from_the_text_so_far_change_no_answer(folders, plain, weights):
    tokens, drafted, _ = answers(folders, speculation="suffix", min_depth=3, max_depth=4, **WEIGHTS[weights])
    assert tokens == plain[weights]
    assert drafted > 0


def test_left_to_itself_it_changes_no_answer_either(folders, plain):
    assert answers(folders, draft_model=folders["rounded"], dtype="float32")[0] == plain["float32"]
    config = {"method": "draft_model", "model": folders["rounded"], "num_speculative_tokens": 3}
    assert answers(folders, speculative_config=config, dtype="float32")[0] == plain["float32"]


def test_a_draft_model_that_is_asked_for_must_be_named(folders):
    with pytest.raises(ModelLoadError, match="name it with --draft-model"):
        HelixEngine(folders["target"], speculation="model")


def test_a_draft_model_that_is_not_there_is_named(folders):
    with pytest.raises(ModelLoadError, match="no-such-model"):
        HelixEngine(folders["target"], draft_model="./no-such-model")


# ---- as other servers are told


@pytest.mark.parametrize(
    "given, meant",
    [
        ({"method": "ngram"}, SpeculativeConfig(speculation="suffix")),
        ({"method": "suffix", "num_speculative_tokens": 64}, SpeculativeConfig(speculation="suffix", max_depth=64)),
        ({"method": "draft_model", "model": "a/b"}, SpeculativeConfig(speculation="model", draft_model="a/b")),
        ({"model": "a/b"}, SpeculativeConfig(speculation="model", draft_model="a/b")),
    ],
)
def test_a_configuration_says_what_plain_settings_say(given, meant):
    assert read_speculative_config(given) == meant
    assert read_speculative_config(json.dumps(given)) == meant


@pytest.mark.parametrize(
    "given, said",
    [
        ("{", "is no JSON"),
        ("[]", "must be a JSON object"),
        ({"method": "ngram", "prompt_lookup_max": 4}, 'no key \'prompt_lookup_max\': there are "method", "model" or'),
        ({"method": "eagle"}, 'method must be "draft_model", "ngram" or "suffix", not "eagle"'),
        ({}, "method must be"),
        ({"method": []}, "method must be"),
        ({"method": "draft_model"}, "needs a model"),
        ({"method": "suffix", "model": "a/b"}, "leave out model"),
        ({"model": 7}, "model must be a GGUF file"),
        ({"model": ""}, "model must be a GGUF file"),
        ({"method": "suffix", "num_speculative_tokens": 0}, "num_speculative_tokens must be 1 to 64, not 0"),
        ({"method": "suffix", "num_speculative_tokens": 65}, "1 to 64, not 65"),
        ({"method": "suffix", "num_speculative_tokens": True}, "1 to 64, not true"),
        ({"method": "suffix", "num_speculative_tokens": "5"}, '1 to 64, not "5"'),
    ],
)
def test_a_configuration_that_is_wrong_is_told_which_key_and_what_it_may_be(given, said):
    with pytest.raises(InvalidRequestError) as caught:
        read_speculative_config(given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_said_twice_differently_is_refused(folders):
    with pytest.raises(InvalidRequestError, match="max_depth 4, but max_depth is set to 5"):
        HelixEngine(
            folders["target"], speculative_config={"method": "suffix", "num_speculative_tokens": 4}, max_depth=5
        )


# ---- the script that makes draft models


def test_rounding_leaves_sixteen_values_a_group_and_the_largest_errors_small():
    torch.manual_seed(0)
    weight = torch.randn(8, 128)
    rounded = round_to_four_bits(weight)
    groups = rounded.reshape(-1, 64)
    assert max(len(group.unique()) for group in groups) <= 16
    spread = weight.reshape(-1, 64).amax(1) - weight.reshape(-1, 64).amin(1)
    assert ((groups - weight.reshape(-1, 64)).abs().amax(1) <= spread / 30 + 1e-6).all()
    assert not torch.equal(rounded, weight)
