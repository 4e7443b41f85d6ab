"""Long prompts are seen for what they are without being parsed, and nothing else is taken for one."""

import json

import pytest

from helix_gateway.gateway.long_bodies import holds_long_value

LIMIT = 10_000
LONG = "x" * (LIMIT + 1)
TEXT, MESSAGES = b'"', b"[{"


def message(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    "fields, name, opening",
    [
        ({"prompt": LONG}, "prompt", TEXT),
        ({"stop": ["]", "\\", '"', "{"], "prompt": LONG}, "prompt", TEXT),
        ({"prompt": '\\"' * LIMIT, "stop": []}, "prompt", TEXT),
        ({"prompt": "\\" * LIMIT}, "prompt", TEXT),
        ({"a": {"prompt": [1]}, "prompt": LONG}, "prompt", TEXT),
        ({"messages": [message(LONG)]}, "messages", MESSAGES),
        ({"model": "m", "messages": [message("")] * 1000}, "messages", MESSAGES),
        ({"messages": [message([{"type": "text", "text": "}]"}] * 500)]}, "messages", MESSAGES),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_long_prompt_is_seen_wherever_it_stands(fields, name, opening, indent):
    assert holds_long_value(json.dumps(fields, indent=indent).encode(), name, opening, LIMIT)


@pytest.mark.parametrize(
    "fields, name, opening",
    [
        ({"prompt": "short", "other": LONG}, "prompt", TEXT),
        ({"other": {"prompt": LONG}}, "prompt", TEXT),
        ({"other": ["prompt", LONG]}, "prompt", TEXT),
        ({"other": 'prompt": "' + LONG}, "prompt", TEXT),
        ({"prompt": ["a"] * LIMIT}, "prompt", TEXT),
        ({"prompt": [1] * LIMIT}, "prompt", TEXT),
        ({"messages": [1] * LIMIT}, "messages", MESSAGES),
        ({"messages": [message("a")], "metadata": {"a": LONG}}, "messages", MESSAGES),
        ({"messages": [message('\\"]}')], "metadata": [LONG]}, "messages", MESSAGES),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_nothing_else_is_taken_for_one(fields, name, opening, indent):
    assert not holds_long_value(json.dumps(fields, indent=indent).encode(), name, opening, LIMIT)


@pytest.mark.parametrize(
    "data", [b"", b"[", b'"', b'{"prompt": "a\\', b'{"prompt"', b"}}}}", b"{" * 100_000, b'{"prompt":']
)
def test_what_is_no_json_is_left_to_the_parser(data):
    assert not holds_long_value(data, "prompt", TEXT, LIMIT)
