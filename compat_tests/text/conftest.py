"""Tokenizers that several tests of this room read from."""

import pytest
from little_tokenizers import TEMPLATE, write_byte_level_gguf, write_sentencepiece_gguf

from helix_gateway.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    return Tokenizer.load(smollm2_path)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    path = tmp_path_factory.mktemp("byte_level") / "little.gguf"
    return Tokenizer.load(write_byte_level_gguf(path, template=TEMPLATE))


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece") / "little.gguf"
    return Tokenizer.load(write_sentencepiece_gguf(path))
