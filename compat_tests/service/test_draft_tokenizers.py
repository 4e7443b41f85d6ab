"""A draft model with another tokenizer, as settings name it: it drafts, no answer changes; or it is refused in one line."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helix_gateway import HelixEngine
from helix_gateway.core.errors import DraftVocabularyError
from helix_gateway.service.tiny_model import write_tiny_model

PROMPTS = ["once upon a time there was", "a b a b a b", "Größe: 12"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def renumbered(target, tmp_path_factory):
    """The same model, whose tokenizer counts its tokens from the other end."""
    folder = tmp_path_factory.mktemp("drafts") / "renumbered"
    shutil.copytree(target, folder)
    definition = json.loads((target / "tokenizer.json").read_text())
    vocab = definition["model"]["vocab"]
    definition["model"]["vocab"] = {token: 255 - index for token, index in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    tensors = load_file(target / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][:256] = tensors[name][:256].flip(0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_it_drafts_whatever_its_ids_and_changes_no_answer(target, renumbered):
    def answers(**settings):
        with HelixEngine(str(target), kv_cache_memory_bytes=4 << 20, dtype="float32", **settings) as engine:
            options = {"max_tokens": 20, "ignore_eos": True, "seed": 3}
            return [
                result
                for temperature in (0.0, 1.0)
                for result in engine.generate(PROMPTS, temperature=temperature, **options)
            ]

    plain = answers(speculation="off")
    drafted = answers(draft_model=str(renumbered), speculation="model", min_depth=3, max_depth=4)
    assert [result.token_ids for result in drafted] == [result.token_ids for result in plain]
    # Made-up weights also write ids that no token has, which the draft model cannot read: it is not always right.
    greedy = drafted[: len(PROMPTS)]
    assert sum(result.metrics.draft_tokens for result in greedy) > 30
    assert sum(result.metrics.accepted_tokens for result in greedy) > 10


def test_one_that_cannot_be_translated_is_refused_by_name(target, tmp_path):
    folder = tmp_path / "words"
    shutil.copytree(target, folder)
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "once": 1, "##s": 2}, unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    words.save(str(folder / "tokenizer.json"))
    with pytest.raises(DraftVocabularyError, match=r"^The draft model's tokenizer is of a kind") as caught:
        HelixEngine(str(target), draft_model=str(folder))
    assert "\n" not in str(caught.value)
