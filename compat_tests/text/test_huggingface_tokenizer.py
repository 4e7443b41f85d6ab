"""Tokenizers of folders in Hugging Face layout, as transformers reads the same folder."""

import json

import pytest
from little_tokenizers import SPECIALS, TEMPLATE, added, save_folder, train_byte_level, write_sentencepiece_model
from tokenizers import processors

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.text.tokenizer import Tokenizer

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
    "chat_template": TEMPLATE,
}
MESSAGES = [{"role": "user", "content": "Hi, it's 5  o'clock"}]


def test_a_folder_gives_what_transformers_gives(tmp_path):
    from transformers import AutoTokenizer

    folder = save_folder(train_byte_level(), tmp_path, config=CONFIG)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    text = ours.render_chat(MESSAGES)
    assert text == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert ours.has_fast_path


def test_answers_end_at_every_token_that_the_generation_configuration_names(tmp_path):
    generation = {"eos_token_id": [0, 2]}
    tokenizer = Tokenizer.load(save_folder(train_byte_level(), tmp_path, config=CONFIG, generation_config=generation))
    assert tokenizer.eos_token_ids == (2, 0)


def test_the_models_configuration_names_eos_where_nothing_else_does(tmp_path):
    folder = save_folder(train_byte_level(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert Tokenizer.load(folder).eos_token_ids == (1,)


def test_bos_of_the_file_is_written_once(tmp_path):
    backend = train_byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer = Tokenizer.load(save_folder(backend, tmp_path))
    assert tokenizer.encode("hi")[0] == 1
    assert tokenizer.encode("<|im_start|>hi") == tokenizer.encode("hi")
    assert tokenizer.encode("hi", add_special_tokens=False) == tokenizer.encode("hi")[1:]


def test_settings_of_somebodys_training_do_not_cut_a_prompt(tmp_path):
    backend = train_byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    tokenizer = Tokenizer.load(save_folder(backend, tmp_path))
    text = "The quick brown fox jumps over the lazy dog"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == []


def test_a_template_in_a_file_of_its_own_counts(tmp_path):
    folder = save_folder(train_byte_level(), tmp_path, config=CONFIG)
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}!")
    assert Tokenizer.load(folder).render_chat(MESSAGES) == "<|im_end|>!"


def test_the_default_of_several_templates_counts(tmp_path):
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = save_folder(train_byte_level(), tmp_path, config={**CONFIG, "chat_template": templates})
    assert Tokenizer.load(folder).render_chat(MESSAGES) == "yes"


def test_a_folder_without_a_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(ModelLoadError, match="holds no tokenizer"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_corrupt_file_is_named(tmp_path, name):
    folder = save_folder(train_byte_level(), tmp_path, config=CONFIG, generation_config={})
    (tmp_path / name).write_text('{"version": ')
    with pytest.raises(ModelLoadError, match=name):
        Tokenizer.load(folder)


def test_an_older_format_is_converted(tmp_path):
    backend = train_byte_level()
    state = json.loads(backend.model.__getstate__())
    (tmp_path / "vocab.json").write_text(json.dumps({**state["vocab"], "<|endoftext|>": 0}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in state["merges"])]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = Tokenizer.load(str(tmp_path))
    text = "The quick brown fox, 123!"
    assert tokenizer.encode(text) == backend.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_that_are_not_special_stay_in_the_text(tmp_path):
    backend = train_byte_level()
    backend.add_tokens([added("<think>"), added("é!")])
    tokenizer = Tokenizer.load(save_folder(backend, tmp_path))
    ids = tokenizer.encode("<think>é!x" + SPECIALS[2])
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "<think>é!x"
    assert tokenizer.token_bytes(ids[1]) == "é!".encode()


@pytest.fixture
def sentencepiece_folder(tmp_path):
    write_sentencepiece_model(tmp_path / "tokenizer.model")
    return tmp_path


TEXTS = ["The quick brown fox", "  two  spaces ", "naïve ž 👍🏽\n", "", "fox</s> dog"]


def test_sentencepieces_own_file_gives_what_the_same_vocabulary_gives_as_gguf(sentencepiece_folder, sentencepiece):
    tokenizer = Tokenizer.load(str(sentencepiece_folder))
    for text in TEXTS:
        assert tokenizer.encode(text) == sentencepiece.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == sentencepiece.decode(sentencepiece.encode(text))


def test_newer_llama_configurations_put_a_space_before_the_first_text_alone(sentencepiece_folder):
    (sentencepiece_folder / "tokenizer_config.json").write_text(json.dumps({"legacy": False, "add_bos_token": False}))
    tokenizer = Tokenizer.load(str(sentencepiece_folder))
    shown = [tokenizer.token_text(token) for token in tokenizer.encode("fox</s>dog")]
    assert "".join(shown) == " fox</s>dog"


def test_tokens_added_behind_sentencepieces_are_found(sentencepiece_folder):
    size = Tokenizer.load(str(sentencepiece_folder)).vocab_size
    added_tokens = {str(size): {"content": "<|end|>", "special": True}, str(size + 1): {"content": "<tool>"}}
    config = sentencepiece_folder / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": added_tokens, "eos_token": "<|end|>"}))
    tokenizer = Tokenizer.load(str(sentencepiece_folder))
    assert tokenizer.encode("<|end|><tool>", add_special_tokens=False) == [size, size + 1]
    assert tokenizer.eos_token_ids == (size,)
    added_tokens[str(size + 7)] = {"content": "<gap>"}
    config.write_text(json.dumps({"added_tokens_decoder": added_tokens}))
    with pytest.raises(ModelLoadError, match="gap"):
        Tokenizer.load(str(sentencepiece_folder))


@pytest.mark.parametrize("content", [b"IQ== 0\nIg== 1\n", b"", b"\x0a\xff", b"\x0a\x02\x08\x01", b"\x0b" * 9])
def test_a_file_that_is_not_sentencepieces_is_one_clear_line(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.model cannot be read: it is not a sentencepiece model"):
        Tokenizer.load(str(tmp_path))


def test_a_sentencepiece_unigram_is_refused_by_name(tmp_path):
    write_sentencepiece_model(tmp_path / "tokenizer.model", model_type=1)
    with pytest.raises(ModelLoadError, match="not of the kind BPE"):
        Tokenizer.load(str(tmp_path))
