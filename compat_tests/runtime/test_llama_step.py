"""Which models run all layers as one compiled call, and that they answer what transformers' modules answer."""

import copy

import numpy as np
import pytest
import torch

from compat_tests.runtime.paged import turn_wrongly_from
from compat_tests.tiny_models import TINY_MODELS
from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.cpu.llama import LlamaStep
from helix_gateway.runtime.cpu.packing import pack_linears
from helix_gateway.runtime.pool import make_runners

LLAMA_LIKE = ["llama", "mistral", "qwen2", "phi3"]


def make_runner(name, *, packed=True, dtype=torch.float32, seed=3):
    _, model = TINY_MODELS[name](seed)
    model = copy.deepcopy(model).to(dtype)
    if packed:
        pack_linears(model)
    (runner,) = make_runners([model], device=torch.device("cpu"), dtype=dtype, num_pages=16)
    return runner


def batch_of(token_ids):
    """One sequence, whole, every row's logits wanted."""
    count = len(token_ids)
    rows = np.arange(count, dtype=np.int32)
    return StepBatch(
        token_ids=np.array(token_ids, np.int32),
        positions=rows,
        cu_seqlens=np.array([0, count], np.int32),
        context_lens=np.array([count], np.int32),
        block_tables=(np.arange(-(-count // 16), dtype=np.int32)[None],),
        logits_rows=rows,
    )


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_a_llama_like_model_is_found_and_answers_what_its_modules_answer(name):
    compiled, plain = make_runner(name), make_runner(name, packed=False)
    assert isinstance(compiled._compute, LlamaStep)
    assert not isinstance(plain._compute, LlamaStep)
    batch = batch_of([(i * 37 + 5) % 256 for i in range(45)])
    torch.testing.assert_close(compiled.forward(batch), plain.forward(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_in_bfloat16_it_is_nearer_to_float32_than_the_modules_are(name):
    batch = batch_of([(i * 37 + 5) % 256 for i in range(45)])
    exact = make_runner(name).forward(batch)
    compiled = make_runner(name, dtype=torch.bfloat16).forward(batch)
    modules = make_runner(name, packed=False, dtype=torch.bfloat16).forward(batch)
    assert (compiled - exact).norm() < (modules - exact).norm()


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "qwen3", "granite", "cohere", "olmo2"])
def test_what_does_not_fit_or_does_not_agree_goes_through_the_modules(name):
    assert not isinstance(make_runner(name)._compute, LlamaStep)


@pytest.mark.parametrize("first_wrong", [17, 400])
def test_a_step_that_is_wrong_at_far_positions_only_is_refused_at_load(monkeypatch, first_wrong):
    turn_wrongly_from(first_wrong, LlamaStep, monkeypatch)
    assert not isinstance(make_runner("llama")._compute, LlamaStep)


def test_a_step_that_confuses_sequences_is_refused_at_load(monkeypatch):
    right = LlamaStep.__call__

    def wrong(self, batch):
        logits = right(self, batch)
        return logits if len(batch.context_lens) < 3 else logits.flip(0)

    monkeypatch.setattr(LlamaStep, "__call__", wrong)
    assert not isinstance(make_runner("llama")._compute, LlamaStep)


def test_joined_products_hold_no_weight_twice():
    runner = make_runner("llama")
    attention = runner._model.base_model.layers[0].self_attn
    tiles = [part.weight_tiles.tiles for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tiles}) == 1
