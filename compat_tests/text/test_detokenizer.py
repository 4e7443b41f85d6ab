"""Streams join to the whole text, characters are never torn, engine and gateway see the same stop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from little_tokenizers import save_folder
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from helix_gateway.text.stop_strings import StopStringFilter
from helix_gateway.text.tokenizer import Tokenizer

KINDS = ["byte_level", "sentencepiece"]
IDS = st.lists(st.integers(0, 460), max_size=20)
TEXTS = st.text(st.sampled_from("ab  The qu\n1éž你👍🏽\u200d"), max_size=20)


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def by_kind(byte_level, sentencepiece):
    return {"byte_level": byte_level, "sentencepiece": sentencepiece}


def groups(ids, sizes):
    """The ids in groups of the given sizes, over and over."""
    start = 0
    while start < len(ids):
        for size in sizes:
            yield ids[start : start + size]
            start += size


@given(kind=st.sampled_from(KINDS), ids=IDS, sizes=st.lists(st.integers(1, 5), min_size=1), skip=st.booleans())
def test_the_stream_joins_to_the_whole_for_any_tokens(by_kind, kind, ids, sizes, skip):
    tokenizer = by_kind[kind]
    stream = tokenizer.detokenizer(skip_special_tokens=skip)
    pieces = [stream.feed(group) for group in groups(ids, sizes)]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


@given(ids=IDS, skip=st.booleans())
def test_byte_level_text_is_what_the_reference_decodes_for_any_tokens(by_kind, ids, skip):
    tokenizer = by_kind["byte_level"]
    assert tokenizer.decode(ids, skip_special_tokens=skip) == tokenizer._backend.decode(ids, skip_special_tokens=skip)


@given(kind=st.sampled_from(KINDS), text=TEXTS)
def test_text_is_what_the_reference_decodes_and_what_went_in(by_kind, kind, text):
    tokenizer = by_kind[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids) == text


@given(kind=st.sampled_from(KINDS), text=TEXTS)
def test_no_piece_holds_half_a_character(by_kind, kind, text):
    tokenizer = by_kind[kind]
    stream = tokenizer.detokenizer()
    sent = ""
    for token in tokenizer.encode(text, add_special_tokens=False):
        sent += stream.feed([token])
        assert text.startswith(sent)
    assert stream.flush() == ""
    assert sent == text


def test_half_a_character_at_the_end_becomes_one_replacement(tokenizer):
    ids = tokenizer.encode("a👍", add_special_tokens=False)
    stream = tokenizer.detokenizer()
    assert stream.feed(ids[:-1]) == "a"
    assert stream.flush() == "\ufffd"


def test_special_tokens_are_shown_only_when_asked_for(byte_level):
    ids = byte_level.encode("<|im_start|>hi<|im_end|>")
    assert byte_level.detokenizer().feed(ids) == "hi"
    assert byte_level.detokenizer(skip_special_tokens=False).feed(ids) == "<|im_start|>hi<|im_end|>"


def test_a_sentencepiece_answer_may_go_on_from_its_prompt(sentencepiece):
    prompt = sentencepiece.encode("The quick")
    answer = sentencepiece.encode("brown", add_special_tokens=False)
    assert sentencepiece.detokenizer().feed(answer) == "brown"
    assert sentencepiece.detokenizer(after=prompt).feed(answer) == " brown"


def test_a_character_begun_in_the_prompt_is_completed(byte_level):
    ids = byte_level.encode("👍")
    assert byte_level.detokenizer(after=ids[:1]).feed(ids[1:]) == "👍"


def test_a_decoder_of_another_kind_streams_too(tmp_path):
    words = ["[UNK]", "play", "##ing", "##ed", "chess", "ž", "##ř"]
    backend = Backend(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tokenizer = Tokenizer.load(save_folder(backend, tmp_path))
    ids = tokenizer.encode("playing chess žř played")
    stream = tokenizer.detokenizer()
    pieces = [stream.feed([token]) for token in [*ids, 99, 2**33]]
    assert "".join(pieces) + stream.flush() == "playing chess žř played" == tokenizer.decode(ids)
    assert not tokenizer.has_fast_path


STOPS = st.lists(st.text(st.sampled_from("ab Th\n你"), min_size=1, max_size=4), min_size=1, max_size=3)


@given(
    kind=st.sampled_from(KINDS),
    ids=st.lists(st.integers(3, 460), max_size=30),
    stops=STOPS,
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
)
def test_engine_and_gateway_agree_on_where_a_stop_is(by_kind, kind, ids, stops, sizes):
    tokenizer = by_kind[kind]
    condition = tokenizer.stop_condition(stops)
    kept = list(ids)
    match, before = None, 0
    for group in groups(ids, sizes):
        match = condition.feed(group)
        if match is not None:
            kept = ids[: before + match.num_tokens]
            break
        before += len(group)
    # The gateway is told the tokens that were kept, in whatever groups the pipe brings them.
    stream, text = tokenizer.detokenizer(), StopStringFilter(stops)
    shown = "".join([text.feed(stream.feed(group)) for group in groups(kept, [3, 1])])
    assert text.matched == (match.reason if match else None)
    if match is None:
        assert shown + text.feed(stream.flush()) + text.flush() == tokenizer.decode(ids)
        return
    assert not any(stop in shown for stop in stops)
    # One token fewer would not have been a stop.
    assert not any(stop in tokenizer.decode(kept[:-1]).removesuffix("\ufffd") for stop in stops)


def test_usage_ends_at_the_token_that_completes_the_stop(smollm2):
    ids = smollm2.encode("One. Two. Three. Four.")
    condition = smollm2.stop_condition(["wo. T"])
    match = condition.feed(ids)
    assert smollm2.decode(ids[: match.num_tokens]) == "One. Two. Three"
    assert match.reason == "wo. T"
