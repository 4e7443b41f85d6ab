"""The fast path gives the reference's tokens, always, or is not used; and no prompt can hang or crash it."""

import random
import time

import pytest
from little_tokenizers import added, train_byte_level, write_byte_level_gguf
from structlog.testing import capture_logs
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from helix_gateway.text import tiktoken_fast_path
from helix_gateway.text.definition import TokenizerDefinition
from helix_gateway.text.huggingface_tokenizer import _merges
from helix_gateway.text.tiktoken_fast_path import find_fast_path
from helix_gateway.text.token_bytes import byte_level_alphabet
from helix_gateway.text.tokenizer import Tokenizer

RANGES = [
    (0x20, 0x7E), (0x20, 0x7E), (0x00, 0x1F), (0x80, 0xFF), (0x100, 0x24F), (0x2B0, 0x36F), (0x370, 0x3FF),
    (0x400, 0x52F), (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1E00, 0x1FFF), (0x2000, 0x206F),
    (0x2070, 0x218F), (0x2190, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xE000, 0xE0FF),
    (0xFE00, 0xFFFD), (0x10400, 0x1044F), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0xE0100, 0xE01EF),
]  # fmt: skip
WORDS = [
    "the",
    "The",
    "and",
    "return",
    "def",
    "class",
    "HelloWorld",
    "don't",
    "I'LL",
    "you've",
    "3.14",
    "1,000",
    "http://x.y/z?q=1",
    "...",
    "---",
    "==",
    "!=",
    "''",
]
BLANKS = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85"]


def letters(rng):
    low, high = rng.choice(RANGES)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8)))


def word(rng):
    return rng.choice(WORDS)


def blanks(rng):
    return rng.choice(BLANKS) * rng.randint(1, 3)


def numerals(rng):
    return "".join(rng.choices("0123456789\u0663\u00b2\u2167", k=rng.randint(1, 6)))


def run(rng):
    return rng.choice("aeZ_!-\u00e9\u4e2d") * rng.choice((2, 5, 40))


def fuzzed(rng, specials):
    """One text: letters of some range, words, digits, white space, special tokens, whole or broken, long runs."""

    def special(rng):
        return rng.choice(specials)[: rng.choice((None, None, -1, 4))]

    kinds = rng.choices((letters, word, blanks, numerals, special, run), (3, 3, 3, 2, 1, 0.5), k=rng.randint(1, 6))
    return rng.choice(("", " ")).join([kind(rng) for kind in kinds])


def assert_equal_to_reference(tokenizer, texts):
    expected = tokenizer._backend.encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding in zip(texts, expected):
        assert tokenizer._fast_path.encode(text) == encoding.ids, ascii(text)


def test_the_default_model_is_encoded_by_tiktoken(smollm2):
    assert smollm2.has_fast_path


def test_a_hundred_thousand_fuzzed_strings_give_the_references_tokens(smollm2):
    rng = random.Random(12)
    specials = [token.content for token in smollm2._backend.get_added_tokens_decoder().values()]
    for _ in range(10):
        assert_equal_to_reference(smollm2, [fuzzed(rng, specials) for _ in range(10_000)])


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "starcoder"])
def test_other_families_give_the_references_tokens(tmp_path, pre):
    tokenizer = Tokenizer.load(write_byte_level_gguf(tmp_path / "m.gguf", pre=pre))
    assert tokenizer.has_fast_path
    rng = random.Random(pre)
    assert_equal_to_reference(tokenizer, [fuzzed(rng, ["<|im_start|>"]) for _ in range(3000)])


def test_what_comes_again_is_encoded_as_before_and_handed_out_anew(smollm2):
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nBe brief.<|im_end|>\n"
    first = smollm2.encode(text)
    expected = list(first)
    first.append(-1)
    hits = smollm2._fast_path._encode_again.cache_info().hits
    assert smollm2.encode(text) == expected
    assert smollm2._fast_path._encode_again.cache_info().hits > hits


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "tekken"])
def test_a_long_text_is_cut_only_where_that_changes_nothing(tmp_path, pre, monkeypatch):
    monkeypatch.setattr(tiktoken_fast_path, "_SEGMENT_CHARS", 5)
    tokenizer = Tokenizer.load(write_byte_level_gguf(tmp_path / "m.gguf", pre=pre))
    rng = random.Random(7)
    texts = ["".join(fuzzed(rng, ["<|im_end|>"]) for _ in range(4)) for _ in range(1000)]
    assert_equal_to_reference(tokenizer, texts)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "1", "!", "\u4e2d", "ab ", "\x04", "<|im_start|>"])
def test_a_long_run_of_anything_is_encoded_in_time(smollm2, unit):
    text = unit * (300_000 // len(unit))
    started = time.perf_counter()
    ids = smollm2.encode(text)
    # Measured: at most 0.3 s on an idle machine.
    assert time.perf_counter() - started < 10
    assert ids == smollm2._backend.encode(text, add_special_tokens=False).ids


def test_ten_megabytes_do_not_hang(smollm2):
    started = time.perf_counter()
    ids = smollm2.encode("Hello, world. It is 5 o'clock.\n" * 330_000)
    assert time.perf_counter() - started < 15
    assert len(ids) > 3_000_000


def definition(backend):
    return TokenizerDefinition(backend, _merges(backend), None, (), {}, None)


def two_merges(*, merges, tokens=("ab", "bc", "abc")):
    """A byte-level BPE with all bytes, and a few tokens and merges of its own."""
    texts = [*byte_level_alphabet().values(), *tokens]
    backend = Backend(models.BPE(vocab={text: index for index, text in enumerate(texts)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def refusal(backend):
    """Why a tokenizer has no fast path, in the one line of the log."""
    with capture_logs() as logs:
        assert find_fast_path(definition(backend)) is None
    (line,) = logs
    return line["reason"]


def test_a_sound_little_tokenizer_is_accepted():
    backend = two_merges(merges=[("a", "b"), ("b", "c"), ("ab", "c")])
    path = find_fast_path(definition(backend))
    assert path.encode("abc bc") == backend.encode("abc bc").ids


def test_merges_out_of_the_order_of_ids_are_refused():
    assert "order" in refusal(two_merges(merges=[("b", "c"), ("a", "b"), ("ab", "c")]))


def test_a_token_that_merging_does_not_reach_is_refused():
    backend = two_merges(tokens=("bc", "ab", "abc"), merges=[("b", "c"), ("a", "b"), ("ab", "c")])
    assert "'abc'" in refusal(backend)


def test_a_token_that_is_only_found_whole_is_refused():
    backend = two_merges(tokens=("bc", "ab", "abc"), merges=[("b", "c"), ("a", "b"), ("ab", "c")])
    backend.model.ignore_merges = True
    assert backend.encode("abc").ids == [258]
    assert "'abc'" in refusal(backend)
    assert backend.model.ignore_merges


def test_a_pre_tokenizer_of_another_kind_is_refused():
    backend = two_merges(merges=[("a", "b")])
    split = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert "pre-tokenizer" in refusal(backend)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert "pre-tokenizer" in refusal(backend)


def test_a_normalizer_of_another_kind_is_refused():
    backend = two_merges(merges=[("a", "b")])
    backend.normalizer = normalizers.Lowercase()
    assert "Lowercase" in refusal(backend)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_are_looked_for_in_their_own_way_are_refused(flag):
    backend = two_merges(merges=[("a", "b")])
    backend.add_tokens([AddedToken("<x>", normalized=False, **{flag: True})])
    assert "<x>" in refusal(backend)


def test_the_longest_of_several_added_tokens_wins():
    backend = train_byte_level()
    backend.add_tokens([added("  "), added("    "), added("<x"), added("<x>y"), added("<x>")])
    path = find_fast_path(definition(backend))
    for text in ("<x>y <x> <xy", "a     b", "    ", "   ", "<<x>>"):
        assert path.encode(text) == backend.encode(text).ids


def test_a_difference_found_at_load_is_refused(monkeypatch):
    monkeypatch.setattr(tiktoken_fast_path, "as_one_pattern", lambda _: r"\p{L}+|\p{N}+|[^\p{L}\p{N}]+")
    assert "other tokens than the reference" in refusal(train_byte_level())
