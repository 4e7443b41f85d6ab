"""GGUF files' tokenizers: which pieces text is cut into, sentencepiece by its definition, what is refused."""

import random
import struct
from itertools import pairwise

import gguf
import pytest
from little_tokenizers import (
    CONTROL,
    CORPUS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    sentencepiece_vocabulary,
    write_byte_level_gguf,
    write_gguf,
    write_sentencepiece_gguf,
)

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.text.gguf_metadata import read_gguf_metadata
from helix_gateway.text.token_bytes import byte_level_bytes
from helix_gateway.text.tokenizer import Tokenizer

TEXT = "It'S we'll  1234 HelloWorld x.y/z\n\n ½"
# What llama.cpp cuts this text into, by the name in tokenizer.ggml.pre.
PIECES = {
    "smollm": "It|'|S| we|'ll|  |1|2|3|4| HelloWorld| x|.|y|/|z|\n\n |½",
    "gpt-2": "It|'|S| we|'ll| | 1234| HelloWorld| x|.|y|/|z|\n\n| ½",
    "llama-bpe": "It|'S| we|'ll| | |123|4| HelloWorld| x|.y|/z|\n\n| |½",
    "qwen2": "It|'S| we|'ll| | |1|2|3|4| HelloWorld| x|.y|/z|\n\n| |½",
    "tekken": "It|'S| we|'ll| | |1|2|3|4| Hello|World| x|.y|/z|\n\n| |½",
    "gpt-4o": "It'S| we'll| | |123|4| Hello|World| x|.y|/z|\n\n| |½",
    "default": "It|'|S| we|'|ll| | |123|4| HelloWorld| x|.|y|/|z|\n\n| |½",
    "deepseek-v3": "It|'S| we|'ll|  |123|4| HelloWorld| x|.y|/z|\n\n| |½",
}
SAME_AS = {"starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "llama3": "llama-bpe", "olmo": "gpt-2"}


def pieces(tokenizer, text):
    cut = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    return "|".join(byte_level_bytes(piece).decode() for piece, _ in cut)


@pytest.mark.parametrize("pre", [*PIECES, *SAME_AS])
def test_text_is_cut_as_the_files_pre_tokenizer_says(tmp_path, pre):
    tokenizer = Tokenizer.load(write_byte_level_gguf(tmp_path / "m.gguf", pre=pre))
    assert pieces(tokenizer, TEXT) == PIECES[SAME_AS.get(pre, pre)]
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == TEXT


def test_a_file_without_a_pre_tokenizer_gets_the_default_one(tmp_path):
    tokenizer = Tokenizer.load(write_byte_level_gguf(tmp_path / "m.gguf", pre=None))
    assert pieces(tokenizer, TEXT) == PIECES["default"]


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path):
    path = write_byte_level_gguf(tmp_path / "m.gguf", pre="kimi-k2")
    with pytest.raises(ModelLoadError, match="'kimi-k2'"):
        Tokenizer.load(path)


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv"])
def test_an_unknown_kind_is_refused_by_name(tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", kind=kind, tokens=["a"], types=[NORMAL])
    with pytest.raises(ModelLoadError, match=f"'{kind}'"):
        Tokenizer.load(path)


def test_a_file_without_merges_says_so(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", kind="gpt2", pre="smollm", tokens=["a"], types=[NORMAL])
    with pytest.raises(ModelLoadError, match=r"lacks 'tokenizer.ggml.merges'"):
        Tokenizer.load(path)


def test_merges_that_make_no_token_are_a_broken_file(tmp_path):
    options = {"tokens": ["a", "b"], "types": [NORMAL] * 2, "merges": [("a", "b")]}
    path = write_gguf(tmp_path / "m.gguf", kind="gpt2", pre="smollm", **options)
    with pytest.raises(ModelLoadError, match="merge of 'a' and 'b' does not fit"):
        Tokenizer.load(path)


@pytest.mark.parametrize("broken", [{"types": [NORMAL]}, {"merges": [("ab", "")]}])
def test_lists_that_do_not_fit_each_other_are_a_broken_file(tmp_path, broken):
    options = {"tokens": ["a", "b", "ab"], "types": [NORMAL] * 3, "merges": [("a", "b")], **broken}
    path = write_gguf(tmp_path / "m.gguf", kind="gpt2", pre="smollm", **options)
    with pytest.raises(ModelLoadError, match=r"is broken|does not fit"):
        Tokenizer.load(path)


@pytest.mark.parametrize("keep", [3, 8, 23, 60, 500])
def test_a_file_cut_short_is_one_clear_line(tmp_path, keep):
    path = tmp_path / "m.gguf"
    write_byte_level_gguf(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match="cannot be read as a GGUF file"):
        Tokenizer.load(str(path))


def test_a_file_of_another_kind_is_one_clear_line(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelLoadError, match="does not begin with the letters GGUF"):
        Tokenizer.load(str(path))


def test_a_future_version_is_refused_with_its_number(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(ModelLoadError, match="version is 9"):
        Tokenizer.load(str(path))


@pytest.mark.parametrize("endian", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_metadata_is_what_was_written(tmp_path, endian):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama", endianess=endian)
    written = {"int": -5, "float": 0.5, "text": "žluťoučký", "list": [1, 2, 3], "texts": ["a", "", "ž"]}
    for name, value in written.items():
        add = {int: writer.add_int32, float: writer.add_float64, str: writer.add_string, list: writer.add_array}
        add[type(value)](name, value)
    writer.add_bool("bool", True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = read_gguf_metadata(path)
    assert {name: read[name] for name in (*written, "bool")} == {**written, "bool": True}


def test_bos_is_written_where_the_file_says_so_and_never_twice(tmp_path):
    with_bos = Tokenizer.load(write_byte_level_gguf(tmp_path / "a.gguf", add_bos_token=True))
    without = Tokenizer.load(write_byte_level_gguf(tmp_path / "b.gguf", add_bos_token=False))
    bare = without.encode("hi")
    assert with_bos.encode("hi") == [with_bos.bos_token_id, *bare]
    assert with_bos.encode("hi", add_special_tokens=False) == bare
    assert with_bos.encode("<|im_start|>hi") == [with_bos.bos_token_id, *bare]


def test_eos_is_written_where_the_file_says_so(tmp_path):
    tokenizer = Tokenizer.load(write_byte_level_gguf(tmp_path / "a.gguf", add_eos_token=True))
    assert tokenizer.encode("hi")[-1] == 2
    assert tokenizer.encode("hi", add_special_tokens=False)[-1] != 2


@pytest.mark.parametrize("pre, expected", [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("smollm", False)])
def test_where_the_file_says_nothing_bos_depends_on_the_family(tmp_path, pre, expected):
    tokenizer = Tokenizer.load(write_byte_level_gguf(tmp_path / "m.gguf", pre=pre))
    assert (tokenizer.encode("hi")[0] == tokenizer.bos_token_id) is expected


def test_answers_end_at_every_token_that_ends_a_turn(tmp_path):
    extra = [("<|eot_id|>", CONTROL), ("<|eom_id|>", CONTROL), ("<stop>", CONTROL), ("<other>", CONTROL)]
    path = tmp_path / "m.gguf"
    first = Tokenizer.load(write_byte_level_gguf(path, extra=extra)).encode("<|eot_id|><|eom_id|><stop>")
    eot, eom, stop = first
    path.unlink()
    tokenizer = Tokenizer.load(write_byte_level_gguf(path, extra=extra, ids={"eos": 0, "eot": stop}))
    assert set(tokenizer.eos_token_ids) == {0, stop, 2, eot, eom}
    assert tokenizer.eos_token_ids[0] == 0


def test_tokens_of_each_type_are_treated_as_their_type_says(tmp_path):
    extra = [("[TOOL]", USER_DEFINED), ("<ctl>", CONTROL), ("[PAD1]", UNUSED)]
    tokenizer = Tokenizer.load(write_byte_level_gguf(tmp_path / "m.gguf", extra=extra))
    ids = tokenizer.encode("x[TOOL]<ctl>[PAD1]")
    names = [tokenizer.token_text(token) for token in ids]
    assert names[:3] == ["x", "[TOOL]", "<ctl>"]
    assert "[PAD1]" not in names
    assert tokenizer.decode(ids) == "x[TOOL][PAD1]"


def test_qwens_text_is_composed_first(tmp_path):
    tokenizer = Tokenizer.load(write_byte_level_gguf(tmp_path / "m.gguf", pre="qwen2"))
    assert tokenizer.has_fast_path
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("café")


def test_a_whole_piece_that_is_a_token_is_that_token_in_llama_3(tmp_path):
    # "ab" and "bc" merge first in "abc", so merging alone never makes the token "abc".
    tokens, merges = ["a", "b", "c", "bc", "ab", "abc"], [("b", "c"), ("a", "b"), ("ab", "c")]
    options = {"tokens": tokens, "types": [NORMAL] * 6, "merges": merges, "add_bos_token": False, "kind": "gpt2"}
    llama3 = Tokenizer.load(write_gguf(tmp_path / "a.gguf", pre="llama-bpe", **options))
    gpt2 = Tokenizer.load(write_gguf(tmp_path / "b.gguf", pre="gpt-2", **options))
    assert llama3.encode("abc") == [5]
    assert gpt2.encode("abc") == [0, 3]
    assert not gpt2.has_fast_path


def sentencepiece_by_definition(text, *, prefix):
    """Join the best-scoring pair of neighbours, the leftmost of equals, until none makes a token."""
    tokens, types, scores = sentencepiece_vocabulary()
    index_of = {token: index for index, token in enumerate(tokens) if types[index] == NORMAL}
    symbols = list((" " + text if prefix and text else text).replace(" ", "\u2581"))
    while True:
        pairs = [(scores[index_of[a + b]], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in index_of]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = []
    for symbol in symbols:
        in_bytes = [tokens.index(f"<0x{byte:02X}>") for byte in symbol.encode()]
        found += [index_of[symbol]] if symbol in index_of else in_bytes
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_joins_by_score_and_falls_back_to_bytes(tmp_path, prefix):
    tokenizer = Tokenizer.load(write_sentencepiece_gguf(tmp_path / "m.gguf", add_space_prefix=prefix))
    rng = random.Random(0)
    texts = ["", " ", "  two  spaces ", "你好 👍🏽 ž", "The quick brown fox", "\n\n\ttab"]
    for _ in range(300):
        start = rng.randrange(len(CORPUS) - 50)
        texts.append(CORPUS[start : start + rng.randint(1, 50)] + rng.choice(["", " ", "ž", "  x"]))
    for text in texts:
        expected = sentencepiece_by_definition(text, prefix=prefix)
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text
        assert tokenizer.encode(text) == [1, *expected]
        assert tokenizer.decode(expected) == text


def test_sentencepiece_puts_a_space_after_each_special_token(sentencepiece):
    ids = sentencepiece.encode("<s>fox</s>dog")
    texts = [sentencepiece.token_text(token) for token in ids]
    assert "".join(texts) == "<s> fox</s> dog"


def test_gemmas_own_symbols_are_found_in_plain_text(tmp_path):
    extra = [("<start_of_turn>", CONTROL), ("<end_of_turn>", CONTROL), ("  ", USER_DEFINED), ("\n\n", USER_DEFINED)]
    tokenizer = Tokenizer.load(write_sentencepiece_gguf(tmp_path / "m.gguf", extra=extra, add_space_prefix=False))
    text = "<start_of_turn>user\n\na  b<end_of_turn>"
    ids = tokenizer.encode(text)
    texts = [tokenizer.token_text(token) for token in ids]
    assert {"<start_of_turn>", "\n\n", "  ", "<end_of_turn>"} <= set(texts)
    assert tokenizer.decode(ids) == "user\n\na  b"
    assert ids[-1] in tokenizer.eos_token_ids
