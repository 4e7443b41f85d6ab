"""A model so small that thousands of tokens come in a second, with a tokenizer, behind a service in this process."""

import pytest

from compat_tests.text.little_tokenizers import save_folder, train_byte_level
from compat_tests.tiny_models import make_model
from helix_gateway.service.in_process import InProcessService
from helix_gateway.service.settings import EngineSettings

CONTEXT = 8192


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_byte_level()
    options = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    _, model = make_model("llama", options, 0)
    model.save_pretrained(folder)
    save_folder(tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_service(tiny_folder):
    made = InProcessService(EngineSettings(model_path=tiny_folder, kv_cache_memory_bytes=64 << 20))
    yield made
    made.close()
