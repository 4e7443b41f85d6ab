"""From a folder to a runner: what is loaded is the model, and memory is asked for with measure."""

import pytest
import torch

from compat_tests.runtime.paged import Feeder, random_sequences
from compat_tests.tiny_models import TINY_MODELS
from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime import factory
from helix_gateway.runtime.factory import load_runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    _, model = TINY_MODELS["qwen3"](0)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return model, str(path)


def test_a_loaded_folder_gives_the_models_own_logits(folder):
    model, path = folder
    loaded = load_runner(path, device="cpu", max_tokens_in_use=1000)
    (tokens,) = random_sequences((30,))
    (logits,) = Feeder(loaded.runner, [tokens]).run(11, 1)
    with torch.inference_mode():
        wanted = model(torch.tensor(tokens[None], dtype=torch.long)).logits[0]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=2e-5)
    assert (loaded.context_length, loaded.step_tokens) == (512, 256)
    assert torch.get_num_threads() == 1


def test_no_more_memory_is_taken_than_the_tokens_need(folder):
    _, path = folder
    assert load_runner(path, device="cpu", max_tokens_in_use=1000).runner.num_pages == 63
    asked = load_runner(path, device="cpu", kv_cache_memory_bytes=1 << 22, max_tokens_in_use=1000).runner
    assert asked.num_pages == (1 << 22) // asked.page_bytes


def test_half_of_what_is_free_is_the_most(folder, monkeypatch):
    _, path = folder
    monkeypatch.setattr(factory, "free_memory_bytes", lambda device: 1 << 21)
    runner = load_runner(path, device="cpu", max_tokens_in_use=1 << 30).runner
    assert runner.num_pages == (1 << 20) // runner.page_bytes


def test_memory_for_not_one_page_is_said_in_one_line(folder):
    _, path = folder
    with pytest.raises(ModelLoadError, match=r"KV cache does not fit.*MiB.*--kv-cache-memory") as refusal:
        load_runner(path, device="cpu", kv_cache_memory_bytes=100, max_tokens_in_use=1000)
    assert "\n" not in str(refusal.value)
