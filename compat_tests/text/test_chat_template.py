"""Conversations as prompts: messages of every form that OpenAI's clients send, and templates that refuse."""

import pytest
from little_tokenizers import TEMPLATE, write_byte_level_gguf

from helix_gateway.core.errors import InvalidRequestError
from helix_gateway.text.chat_template import ChatTemplate
from helix_gateway.text.tokenizer import Tokenizer


def render(source, messages, **options):
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **options)


def test_a_conversation_is_written_as_the_model_learned_it(byte_level):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert byte_level.render_chat(messages) == expected + "<|im_start|>assistant\n"
    assert byte_level.render_chat(messages, add_generation_prompt=False) == expected


def test_developer_is_system_and_no_content_is_empty(byte_level):
    messages = [{"role": "developer", "content": "A"}, {"role": "assistant", "content": None}, {"role": "assistant"}]
    assert byte_level.render_chat(messages, add_generation_prompt=False) == (
        "<|im_start|>system\nA<|im_end|>\n" + "<|im_start|>assistant\n<|im_end|>\n" * 2
    )


def test_parts_of_text_are_joined(byte_level):
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi"}]
    assert "user\nSay hi<|im_end|>" in byte_level.render_chat([{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, {"type": "text", "text": 1}, 7, "bare"]
)
def test_a_part_that_is_not_text_is_named_by_its_path(byte_level, part):
    with pytest.raises(InvalidRequestError) as caught:
        byte_level.render_chat([{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    assert caught.value.param == "messages[0].content[1]"


def test_what_a_template_raises_is_the_answer():
    source = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render(source, [])


@pytest.mark.parametrize(
    "source", ["{{ messages[0].x.y }}", "{{ 1 // 0 }}", "{% if %}", "{{ 'a' + 1 }}", "{{ ().__class__.__bases__ }}"]
)
def test_a_template_that_fails_is_the_requests_fault(source):
    with pytest.raises(InvalidRequestError, match="chat template does not accept"):
        render(source, [{"role": "user", "content": "x"}])


def test_a_template_sees_special_tokens_tools_and_variables():
    source = "{{ bos_token }}{{ tools[0].function.name }} {{ enable_thinking }}{{ eos_token }}"
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert render(source, [], tools=tools, variables={"enable_thinking": False}) == "<s>add False</s>"


def test_a_model_without_a_template_points_to_completions(tmp_path):
    tokenizer = Tokenizer.load(write_byte_level_gguf(tmp_path / "m.gguf"))
    assert tokenizer.chat_template is None
    with pytest.raises(InvalidRequestError, match="/v1/completions"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_the_template_is_shown_as_it_is(byte_level):
    assert byte_level.chat_template == TEMPLATE


def test_the_callers_messages_stay_as_they_were(byte_level):
    messages = [{"role": "developer", "content": [{"type": "text", "text": "a"}]}]
    byte_level.render_chat(messages)
    assert messages == [{"role": "developer", "content": [{"type": "text", "text": "a"}]}]
