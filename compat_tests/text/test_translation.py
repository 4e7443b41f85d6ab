"""Drafts between models of different tokenizers: what is read, what is proposed, what is refused."""

import inspect
import json
import pprint
import time
from itertools import accumulate, pairwise

import numpy as np
import other_tokenizers
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import normalizers

from helix_gateway.core.errors import DraftVocabularyError
from helix_gateway.text.awkward_texts import AWKWARD_TEXTS
from helix_gateway.text.translation.by_text import TextTranslation
from helix_gateway.text.translation.by_token import TokenTranslation
from helix_gateway.text.translation.choice import translate_vocabularies

PAIRS = ["smollm2 byte_level", "byte_level smollm2", "smollm2 unigram", "unigram smollm2", "unigram byte_level"]
PROSE = (
    "When the tide went out, the children ran to the rocks; there's always something left behind. "
    "Crabs, mostly, and bottle-green glass that nobody wants. By 1987 about 12,500 people lived here.\n\n"
)
CODE = inspect.getsource(json) + inspect.getsource(pprint)


@pytest.fixture(scope="session")
def loaded(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    made = other_tokenizers
    return {
        "smollm2": smollm2,
        "byte_level": made.load(made.byte_level(), folder / "byte_level", eos_token="</s>", pad_token="<pad>"),
        "unigram": made.load(made.unigram(), folder / "unigram", eos_token="</s>", bos_token="<s>"),
    }


@pytest.fixture(scope="session")
def pairs(loaded):
    """Translations by the names of target and draft."""
    return {pair: (*(loaded[name] for name in pair.split()), _translated(loaded, pair)) for pair in PAIRS}


def _translated(loaded, pair):
    target, draft = pair.split()
    return translate_vocabularies(loaded[target], loaded[draft])


def _said(tokenizer, token_ids):
    return b"".join(tokenizer.token_bytes(token) for token in token_ids)


def _keeps(tokenizer, text):
    """Whether a tokenizer has tokens for all of a text."""
    return _said(tokenizer, tokenizer.encode(text, add_special_tokens=False)).strip() == text.encode().strip()


def _chunks(ids, sizes):
    """Some tokens as they come: first so many, then so many, over and over."""
    at = step = 0
    while at < len(ids):
        size = sizes[step % len(sizes)]
        yield ids[at : at + size]
        at, step = at + size, step + 1


def _read(translation, chunks):
    """A sequence that has read them; what it promised to keep it has kept."""
    sequence = translation.begin()
    for chunk in chunks:
        before = list(sequence.draft_token_ids)
        kept = sequence.extend(chunk)
        assert list(sequence.draft_token_ids[:kept]) == before[:kept]
        assert kept <= len(before)
    return sequence


words = st.sampled_from(
    [*PROSE.split(" "), *CODE.split(" "), "naïve café", "你好，世界", "Привет", "👩‍👩‍👧 👍🏽", "\n\n", "\t"]
)
runs = st.builds(
    lambda letter, count: letter * count, st.sampled_from([" ", "\n", "=", "ab", "-", "é"]), st.integers(1, 40)
)
numbers = st.integers(0, 10**12).map(str)
texts = st.lists(st.one_of(words, words, words, runs, numbers, st.text(max_size=12)), max_size=40).map(" ".join)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_draft_model_reads_a_text_as_its_own_tokenizer_cuts_it(pairs, pair):
    target, draft, translation = pairs[pair]
    for text in (PROSE * 5, CODE, CODE.replace("\n", "\n\n\n"), *(PROSE + text for text in AWKWARD_TEXTS)):
        if not (_keeps(draft, text) and _keeps(target, text)):
            continue
        if "unigram" in pair and "0" * 300 in text:
            continue  # cut into pairs and one single digit, which may be any
        ids = target.encode(text, add_special_tokens=False)
        sequence = _read(translation, _chunks(ids, [3, 1, 1, 7, 1]))
        assert (text, list(sequence.draft_token_ids)) == (text, draft.encode(text))


@pytest.mark.parametrize("pair", PAIRS)
def test_token_by_token_it_reads_what_it_reads_at_once(pairs, pair):
    target, _, translation = pairs[pair]

    @given(texts, sizes)
    def check(text, sizes):
        ids = target.encode(text, add_special_tokens=False)
        step_by_step = _read(translation, _chunks(ids, sizes)).draft_token_ids
        assert list(step_by_step) == list(_read(translation, [ids]).draft_token_ids)

    check()


@pytest.mark.parametrize("pair", PAIRS)
def test_whatever_the_target_writes_the_draft_model_reads_the_same_bytes(pairs, pair):
    target, draft, translation = pairs[pair]
    ordinary = [
        token
        for token in range(target.vocab_size)
        if token not in target.token_bytes_table.special_ids and token not in target.eos_token_ids
    ]

    @given(st.lists(st.sampled_from(ordinary), max_size=60), sizes)
    def check(ids, sizes):
        read = _read(translation, _chunks(ids, sizes)).draft_token_ids[len(draft.prompt_prefix) :]
        assert sayable(_said(draft, read)).lstrip(b" ") == sayable(_said(target, ids)).lstrip(b" ")

    def sayable(data):
        # SmolLM2 has no token for a few bytes, of which text hardly ever has one.
        return bytes(byte for byte in data if bytes([byte]) in translation.draft_encoder._vocabulary.by_bytes)

    check()


@pytest.mark.parametrize("pair", PAIRS)
def test_proposals_say_what_the_draft_model_wrote_and_know_how_much_of_it(pairs, pair):
    target, draft, translation = pairs[pair]

    @given(texts, st.lists(st.integers(0, draft.vocab_size - 1), max_size=8), st.one_of(texts, st.none()))
    @example("I was here.", [], " It's 12345 👩‍👩‍👧!")
    def check(text, drafted, continued):
        sequence = _read(translation, [target.encode(text, add_special_tokens=False)])
        if continued is not None:
            drafted = draft.encode(continued, add_special_tokens=False)
        unsaid = sequence._text.unsaid
        proposal = sequence.to_target(drafted)
        wrote = _said(draft, drafted)
        ends = list(accumulate(len(target.token_bytes(token)) for token in proposal.token_ids))
        ordinary = not {*drafted} & {*draft.token_bytes_table.special_ids, *draft.eos_token_ids}
        assert not ordinary or wrote.startswith(unsaid + _said(target, proposal.token_ids))
        assert all(earlier <= later for earlier, later in pairwise(proposal.rests_on))
        for end, count in zip(ends, proposal.rests_on, strict=True):
            assert not ordinary or len(_said(draft, drafted[: count - 1])) < end + len(unsaid)
            assert not ordinary or len(_said(draft, drafted[:count])) >= end + len(unsaid)

    check()


@pytest.mark.parametrize("pair", PAIRS)
def test_a_draft_that_is_right_is_nearly_all_accepted(pairs, pair):
    """Wrong is at most the last word, which the draft may have left in its middle."""
    target, draft, translation = pairs[pair]
    text = PROSE + CODE[:6000]
    ids = target.encode(text, add_special_tokens=False)
    proposed = accepted = drafted = 0
    for place in range(60, len(ids) - 60, 7):
        sequence = _read(translation, [ids[:place]])
        right = _said(target, ids[place : place + 60])
        rest, _ = translation.draft_encoder.encode_behind(right)
        proposal = sequence.to_target(rest[:8]).token_ids
        same = next((n for n, pair in enumerate(zip(proposal, ids[place:])) if pair[0] != pair[1]), len(proposal))
        proposed, accepted, drafted = proposed + len(proposal), accepted + same, drafted + 8
    print(f"\n{pair}: of {drafted} drafted tokens came {proposed}, of which {accepted} are right")
    assert accepted > 0.85 * proposed
    # As many as there are in the bytes that were drafted, but for the last word.
    assert accepted > 0.8 * drafted * len(ids) / len(draft.encode(text))


@pytest.mark.parametrize("pair", PAIRS)
def test_half_a_character_is_completed_by_a_draft_and_never_proposed(pairs, pair):
    target, _, translation = pairs[pair]
    ids = target.encode("See 👩👍", add_special_tokens=False)
    for place in range(len(ids) - 4, len(ids)):
        sequence = _read(translation, [ids[:place]])
        rest, _ = translation.draft_encoder.encode_behind(_said(target, ids[place:]))
        for count in range(len(rest) + 1):
            proposal = sequence.to_target(rest[:count]).token_ids
            text = _said(target, ids[:place]) + _said(target, proposal)
            assert not proposal or text.decode("utf-8", errors="replace")[-1] != "\ufffd"
        assert _said(target, sequence.to_target(rest).token_ids) == _said(target, ids[place:])


def test_special_tokens_go_through_where_both_mean_the_same(loaded, pairs):
    smollm2, byte_level = loaded["smollm2"], loaded["byte_level"]
    to_byte_level = pairs["smollm2 byte_level"][2]
    end = smollm2.eos_token_ids[0]
    # The end of an answer is one in both; how a turn begins has no word in the other.
    (begin,) = smollm2.encode("<|im_start|>")
    ids = [begin, *smollm2.encode("Hi"), end, *smollm2.encode("\n")]
    read = _read(to_byte_level, [ids]).draft_token_ids
    assert list(read) == [*byte_level.encode("Hi"), *byte_level.eos_token_ids, *byte_level.encode("\n")]
    sequence = _read(to_byte_level, [smollm2.encode("Well")])
    drafted = [*byte_level.encode(" done."), byte_level.eos_token_ids[0], *byte_level.encode("more")]
    assert sequence.to_target(drafted).token_ids == [*smollm2.encode(" done."), end]
    (pad,) = byte_level.encode("<pad>")
    assert sequence.to_target([pad, *drafted]).token_ids == []


def test_each_model_has_its_own_way_to_begin_a_prompt(loaded, pairs):
    unigram, smollm2 = loaded["unigram"], loaded["smollm2"]
    assert list(pairs["smollm2 unigram"][2].begin().draft_token_ids) == [unigram.bos_token_id]
    read = _read(pairs["unigram smollm2"][2], [unigram.encode("Hello there")]).draft_token_ids
    assert smollm2.decode(list(read), skip_special_tokens=True) == "Hello there"


@pytest.mark.parametrize("pair", PAIRS)
def test_the_cost_of_a_token_does_not_grow_with_the_context(loaded, pairs, pair, monkeypatch):
    target, draft, translation = pairs[pair]
    text = (PROSE + CODE) * 4
    ids = target.encode(text, add_special_tokens=False)
    assert len(ids) > 4500
    sequence = _read(translation, [ids[:4096]])
    encoded = []
    for vocabulary in (translation.draft_encoder._vocabulary, translation.target_encoder._vocabulary):
        encode = vocabulary.encode
        monkeypatch.setattr(
            vocabulary, "encode", lambda text, encode=encode, **how: encoded.append(text) or encode(text, **how)
        )
    took_us = []
    for token in ids[4096:4496]:
        started = time.perf_counter_ns()
        sequence.extend([token])
        took_us.append((time.perf_counter_ns() - started) / 1000)
    print(f"\n{pair}: {np.median(took_us):.0f} µs to read a token after 4,096")
    assert len(encoded) < 1.1 * 400
    assert max(map(len, encoded)) < 400
    assert np.mean([len(text) for text in encoded]) < 100
    encoded.clear()
    sequence.to_target(draft.encode(PROSE, add_special_tokens=False)[:8])
    assert sum(map(len, encoded)) < 250


def test_a_long_run_of_one_letter_costs_a_bounded_window(pairs):
    target, draft, translation = pairs["smollm2 byte_level"]
    ids = target.encode("=" * 40_000 + "\n", add_special_tokens=False)
    sequence = _read(translation, _chunks(ids, [64]))
    assert _said(draft, sequence.draft_token_ids) == b"=" * 40_000 + b"\n"


def test_a_prompt_that_is_no_text_is_read_in_a_second(pairs):
    target, draft, translation = pairs["byte_level smollm2"]
    (high,) = [token for token in range(256 + 2) if target.token_bytes(token) == b"\xe4"]
    started = time.process_time()
    sequence = _read(translation, [[high] * 50_000])
    assert time.process_time() - started < 1
    assert _said(draft, sequence.draft_token_ids) == b"\xe4" * 50_000


def test_the_same_tokens_need_no_translation(smollm2):
    assert translate_vocabularies(smollm2, smollm2) is None


def test_tokens_that_are_numbered_otherwise_are_translated_one_by_one(tmp_path):
    made = other_tokenizers
    backend = made.byte_level()
    lacking = sorted(token for token in backend.get_vocab() if len(token) > 14)[:20]
    target = made.load(backend, tmp_path / "target", eos_token="</s>")
    draft = made.load(made.renumbered(backend, by=7, without=lacking), tmp_path / "draft", eos_token="</s>")
    translation = translate_vocabularies(target, draft)
    assert isinstance(translation, TokenTranslation)
    assert not translation.shares_ids
    ids = target.encode(CODE + "".join(lacking).replace("Ġ", " "), add_special_tokens=False)
    sequence = _read(translation, _chunks(ids, [1, 5]))
    assert _said(draft, sequence.draft_token_ids) == _said(target, ids)
    assert sequence.to_target(draft.encode("import json")).token_ids == target.encode("import json")
    assert sequence.to_target(draft.encode("</s>")).token_ids == [*target.eos_token_ids]
    mask = translation.allowed(draft.vocab_size + 40)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert mask.dtype == np.uint32
    assert len(mask) == -(-(draft.vocab_size + 40) // 32)
    assert not bits[:7].any()
    assert not bits[draft.vocab_size :].any()
    assert bits.sum() == draft.vocab_size - 7 - len(lacking)


def test_a_target_with_more_tokens_than_its_draft_model_shares_those_that_both_have(tmp_path):
    made = other_tokenizers
    backend = made.byte_level()
    draft = made.load(backend, tmp_path / "draft", eos_token="</s>")
    longer = type(backend).from_str(backend.to_str())
    longer.add_special_tokens(["<tool>"])
    target = made.load(longer, tmp_path / "target", eos_token="</s>")
    translation = translate_vocabularies(target, draft)
    assert isinstance(translation, TokenTranslation)
    assert translation.shares_ids
    assert translation.allowed(draft.vocab_size) is None
    read = _read(translation, [target.encode("a<tool>b")]).draft_token_ids
    assert list(read) == [*draft.encode("a"), *draft.encode("b")]

    # The other way round the draft model is held to what the target has too.
    translation = translate_vocabularies(draft, target)
    assert translation.shares_ids
    bits = np.unpackbits(translation.allowed(target.vocab_size).view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == list(range(draft.vocab_size))
    (tool,) = target.encode("<tool>")
    assert translation.begin().to_target([5, tool, 6]).token_ids == [5]


def test_vocabularies_that_cut_text_otherwise_are_translated_through_text(pairs):
    assert all(isinstance(translation, TextTranslation) for _, _, translation in pairs.values())
    assert not any(translation.shares_ids for _, _, translation in pairs.values())


def test_tokens_that_are_not_bytes_of_text_are_refused_by_name(loaded, tmp_path):
    bert = other_tokenizers.load(other_tokenizers.word_piece(), tmp_path / "bert")
    with pytest.raises(DraftVocabularyError, match=r"^The draft model's tokenizer is of a kind .*another|same family"):
        translate_vocabularies(loaded["smollm2"], bert)
    with pytest.raises(DraftVocabularyError, match=r"^The model's tokenizer is of a kind"):
        translate_vocabularies(bert, loaded["smollm2"])
    assert translate_vocabularies(bert, bert) is None


def test_a_tokenizer_that_changes_text_is_refused_by_name(loaded, tmp_path):
    backend = other_tokenizers.renumbered(other_tokenizers.byte_level(), by=0)
    backend.normalizer = normalizers.Replace("e", "a")
    lossy = other_tokenizers.load(backend, tmp_path / "lossy")
    with pytest.raises(DraftVocabularyError, match="The draft model's tokenizer changes the text"):
        translate_vocabularies(loaded["smollm2"], lossy)
