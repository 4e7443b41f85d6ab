"""The real model, greedily, in float32: Helix answers what transformers' generate answers.

The reference was written by ``scripts/make_goldens.py``; some of its answers are computed anew here,
all of them in a deep run.
"""

import json
from pathlib import Path

import pytest
import torch

from compat_tests.effort import deeply
from helix_gateway import HelixEngine
from helix_gateway.runtime.loading import load_model
from helix_gateway.text.tokenizer import Tokenizer

FILE = Path(__file__).parent.parent / "data" / "smollm2_greedy.json"
RECORD = json.loads(FILE.read_text())
GOLDENS = RECORD["goldens"]


def assert_equal_up_to_close_calls(tokens, golden):
    """Where the reference's two best logits are within 1e-3, the other choice, and all after it, is as good."""
    for position, (got, wanted) in enumerate(zip(tokens, golden["tokens"], strict=False)):
        if got != wanted:
            assert position in golden["close"], f"token {position} of the answer differs"
            return
    assert len(tokens) == len(golden["tokens"])


@pytest.fixture(scope="module")
def engine(smollm2_path):
    with HelixEngine(smollm2_path, dtype="float32", kv_cache_memory_bytes=2 << 30) as made:
        yield made


def test_all_prompts_at_once_are_answered_as_by_generate(engine):
    results = engine.generate(
        [golden["prompt"] for golden in GOLDENS], temperature=0.0, max_tokens=RECORD["new_tokens"]
    )
    for result, golden in zip(results, GOLDENS, strict=True):
        assert_equal_up_to_close_calls(result.token_ids, golden)


def test_one_at_a_time_out_of_a_warm_cache_they_are_answered_the_same(engine):
    for golden in GOLDENS[::8]:
        result = engine.generate([golden["prompt"]], temperature=0.0, max_tokens=RECORD["new_tokens"])[0]
        assert_equal_up_to_close_calls(result.token_ids, golden)
        assert result.metrics.cached_tokens == len(golden["prompt"]) - 1 or result.metrics.cached_tokens % 16 == 0


@torch.inference_mode()
def test_the_reference_still_answers_what_is_written_down(smollm2_path):
    model = load_model(smollm2_path, device=torch.device("cpu"), dtype=torch.float32)
    eos = sorted(Tokenizer.load(smollm2_path).eos_token_ids)
    new_tokens = deeply(12, RECORD["new_tokens"])
    for golden in sorted(GOLDENS, key=lambda golden: len(golden["prompt"]))[: deeply(2, None)]:
        prompt = golden["prompt"]
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos[0]
        )
        tokens = [token for token in output[0, len(prompt) :].tolist() if token not in eos]
        assert_equal_up_to_close_calls(tokens, {**golden, "tokens": golden["tokens"][:new_tokens]})
