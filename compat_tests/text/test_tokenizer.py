"""What gateway and service see of a tokenizer, on the default model."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from helix_gateway.core.errors import InvalidRequestError, ModelLoadError
from helix_gateway.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Say hi"}]


LOADING = """
import sys, time
from helix_gateway.text.tokenizer import Tokenizer
started = time.process_time()
Tokenizer.load(sys.argv[1])
print(time.process_time() - started)
"""


def test_the_default_model_loads_within_a_second_and_a_half(smollm2_path):
    # The processor's time, since what else the machine does is not the tokenizer's doing, and in a process of its own,
    # since among a thousand tests' objects collecting garbage takes a second by itself.  Measured: 0.4 s.
    command = [sys.executable, "-c", LOADING, smollm2_path]
    taken = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert float(taken) < 1.5


def test_the_default_model_ends_its_answers_with_im_end(smollm2):
    assert [smollm2.token_text(token) for token in smollm2.eos_token_ids] == ["<|im_end|>"]
    assert smollm2.vocab_size == 49152


def test_text_comes_back_from_its_tokens(smollm2):
    text = "Hello  world 123, naïve 你好 👩‍👩‍👧 \t\n\n end "
    assert smollm2.decode(smollm2.encode(text)) == text


def test_each_digit_is_a_token_as_llama_cpp_has_it(smollm2):
    # transformers' reading of the same file has ["a", " ", " ", "1"] here.
    assert [smollm2.token_text(token) for token in smollm2.encode("a  1")] == ["a", "  ", "1"]
    assert [smollm2.token_text(token) for token in smollm2.encode(" 2024")] == [" ", "2", "0", "2", "4"]


def test_chat_markers_become_special_tokens(smollm2):
    ids = smollm2.encode(smollm2.render_chat(CHAT), add_special_tokens=False)
    assert [smollm2.token_text(token) for token in ids[:4]] == ["<|im_start|>", "system", "\n", "You"]
    assert smollm2.decode(ids).endswith("user\nSay hi\nassistant\n")
    assert smollm2.decode(ids, skip_special_tokens=False) == smollm2.render_chat(CHAT)


def test_half_a_surrogate_pair_is_a_clear_error(smollm2):
    with pytest.raises(InvalidRequestError, match=r"surrogate.*U\+D800, at character 2"):
        smollm2.encode("hi\ud800")


def test_half_a_surrogate_pair_in_a_message_is_named_by_its_path(smollm2):
    parts = [{"type": "text", "text": "fine"}, {"type": "text", "text": "\udfff"}]
    with pytest.raises(InvalidRequestError) as caught:
        smollm2.render_chat([{"role": "user", "content": parts}])
    assert caught.value.param == "messages[0].content[1].text"


def test_a_token_that_is_part_of_a_character_shows_its_bytes(smollm2):
    ids = smollm2.encode("👩")
    assert len(ids) > 1
    assert b"".join(smollm2.token_bytes(token) for token in ids).decode() == "👩"
    assert smollm2.token_text(ids[0]) == "\ufffd"


@pytest.mark.parametrize("token_id", [-1, 49152, 2**31, 2**40])
def test_an_id_that_no_token_has_says_nothing(smollm2, token_id):
    assert smollm2.token_bytes(token_id) == b""
    assert smollm2.decode([token_id]) == ""


def test_a_text_has_at_least_as_many_tokens_as_was_said(smollm2):
    for text in ("", "a", " " * 5000, "1" * 500, "Hello, world. " * 100):
        assert smollm2.least_tokens(text) <= len(smollm2.encode(text))
    assert smollm2.least_tokens("Hello, world. " * 10**6) > 50_000


def test_threads_encode_at_the_same_time(smollm2):
    texts = [f"{n} bottles of beer, {'x' * n} — <|im_end|>" for n in range(200)]
    alone = [smollm2.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(smollm2.encode, texts)) == alone


def test_a_missing_model_is_one_clear_line(tmp_path):
    with pytest.raises(ModelLoadError, match="There is no model at"):
        Tokenizer.load(str(tmp_path / "nothing.gguf"))
