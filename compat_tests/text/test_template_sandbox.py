"""What a template writes here is what transformers writes with it; and it gets out of the sandbox no further."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from little_tokenizers import TEMPLATE
from transformers.utils.chat_template_utils import render_jinja_template

from helix_gateway.core.errors import InvalidRequestError
from helix_gateway.service.tiny_model import _TEMPLATE
from helix_gateway.text.chat_template import ChatTemplate
from helix_gateway.text.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "wetter_für",
            "description": 'It\'s <warm> & "dry"?',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"id": "1", "type": "function", "function": {"name": "wetter_für", "arguments": {"city": "Köln", "days": 2}}}
CONVERSATIONS = {
    "one question": [{"role": "user", "content": "Hi <b>there</b> & you"}],
    "several turns": [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "  Who are\n\nyou? "},
        {"role": "assistant", "content": "I'm “me”. 😀"},
        {"role": "user", "content": ""},
    ],
    "tools": [
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"°C": 21.5}', "tool_call_id": "1"},
    ],
    "reasoning": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "reasoning": "one and one"},
        {"role": "assistant", "content": "3", "thinking": "no", "reasoning_content": None},
        {"role": "assistant", "content": "4", "reasoning_content": "yes", "thinking": "other"},
    ],
    "wrong order": [{"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "again"}],
}

# As the templates of known families are written, each with what it asks of Jinja.
FAMILIES = {
    "chatml": TEMPLATE,
    "of the doctor's model": _TEMPLATE,
    "llama 2: alternation, slices, raising": """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate!') }}
    {% endif %}
    {% if loop.index0 == 0 and system is not false %}
        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}{% set content = message['content'] %}{% endif %}
    {{ bos_token + '[INST] ' + content | trim + ' [/INST]' if message['role'] == 'user' else content | trim + eos_token }}
{% endfor %}""",
    "llama 3: dates, tools in JSON, defaults": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if tools is not none %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}{% endif -%}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{- "}" }}
    {%- elif message.content is mapping or message.content is iterable and message.content is not string %}
        {{- message.content | tojson }}
    {%- else %}{{- '<|h|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|e|>' }}{% endif %}
{%- endfor %}{{ date_string }}""",
    "mistral: namespaces, selections, sorted keys": """{%- set ns = namespace(index=0, last=none) %}
{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{%- for message in messages if message.role != 'system' %}
    {%- set ns.index = ns.index + 1 %}{% set ns.last = message %}
    {%- for key, value in message.items() | list if key != 'role' and value is not none %}
        {{- key ~ '=' ~ value }}
    {%- endfor %}
{%- endfor %}
{{- ns.index ~ '/' ~ user_messages | length }}{{ dict(a=1, b=[ns.index]) | tojson(sort_keys=true, separators=(',', ':')) }}
{{- dict.fromkeys(['x', 'y'], 0) }}{{ (tools or []) | tojson(ensure_ascii=true) }}""",
    "gemma: names of roles, generation prompt": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + (message['content'] or '') | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    "qwen 3: neighbours, splitting, reasoning, steps backwards": """{%- macro shown(text) %}[{{ text | upper }}]{% endmacro %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not(message.content.startswith('<t>')) %}
        {%- set ns.multi_step = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
        {{- '<think>' ~ message.reasoning_content.strip('\\n') ~ '|' ~ message.thinking ~ '</think>' }}
    {%- endif %}
    {{- shown(content) ~ (loop.previtem.role if loop.previtem else '-') ~ (loop.nextitem is defined) ~ loop.last }}
{%- endfor %}{{ ns.last }}{{ enable_thinking | default('unset') }}""",
    "smollm 3: marked generations, loop controls, dates": """{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% set seen = 'outside' %}
    {% if message.role == 'assistant' %}{% generation %}{% set seen = 'inside' %}{{ message.content }}
{{ seen }} {{ loop.index }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}
 {{ seen }}{% if loop.index == 3 %}{% break %}{% endif %}
{% endfor %}{{ strftime_now('%Y-%m-%d') }}{{ documents is none }}""",
    "phi: arithmetic and filters": """{% for m in messages %}{{ m | tojson }}{{ m.content | replace('<', '[') | length }}
{{- m.role in ['user', 'system'] and loop.revindex0 // 2 }}{{ '%s-%05.2f' | format(m.role, 1.5) }}{% endfor %}""",
    "what is not there": "{{ nothing }}{{ nothing is defined }}{{ messages[0].nothing }}|{{ messages[0]['x'] | default(7) }}",
    "whitespace": "  {% if true %}\n    a\n  {%- endif %}\n\n{# note #}\n  b  {{ 1 }}\n\n",
}
ESCAPES = {
    "a class": "{{ ().__class__ }}",
    "a class's bases": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "dict's own": "{{ dict.__base__ }}",
    "dict's call": "{{ dict.__call__.__globals__ }}",
    "a filter's module": "{{ raise_exception.__globals__ }}",
    "a namespace's own": "{% set ns = namespace() %}{% set ns._Namespace__attrs = {} %}{{ ns }}",
    "a namespace made with one": "{{ namespace(__class__=1).__class__ }}",
    "a namespace of pairs": "{{ namespace([('_x', 1)])._x }}",
    "a change to a message": "{{ messages[0].update(role='x') }}{{ messages }}",
    "a change to the list": "{{ messages.append(1) }}{{ messages }}",
    "formatting": "{{ '{0.__class__}'.format(messages) }}",
    "many numbers": "{{ range(10000000) | length }}",
    "a loaded file": "{% include '/etc/hostname' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "a cycler": "{{ cycler.__init__.__globals__ }}",
}


def ours(source, messages, **options):
    try:
        return ChatTemplate(source, SPECIAL).render(messages, **options)
    except InvalidRequestError as error:
        return type(error.__cause__)


def theirs(source, messages, *, tools=None, variables=None, add_generation_prompt=True):
    try:
        texts, _ = render_jinja_template(
            [[dict(message) for message in messages]],
            tools=tools,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            **SPECIAL,
            **(variables or {}),
        )
    except Exception as error:  # noqa: BLE001 - a template is a program of its own
        return type(error)
    return texts[0]


def shipped_templates():
    """Templates that transformers' own sources hold."""
    for path in sorted(Path(transformers.__file__).parent.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "{%" in source and "message" in source:
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and "{% for" in node.value:
                    yield pytest.param(node.value, id=f"{path.stem}:{node.lineno}")


OPTIONS = [
    {},
    {"add_generation_prompt": False},
    {"tools": TOOLS},
    {"variables": {"enable_thinking": False, "date_string": "today", "_x": 1}},
    {"variables": {"messages": []}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "no prompt", "tools", "variables", "messages twice"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_writes_what_it_writes_in_transformers(family, conversation, options):
    messages = CONVERSATIONS[conversation]
    assert ours(FAMILIES[family], messages, **options) == theirs(FAMILIES[family], messages, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_something_here(family):
    written = [ours(FAMILIES[family], messages) for messages in CONVERSATIONS.values()]
    assert any(isinstance(text, str) and text for text in written)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("source", list(shipped_templates()))
def test_so_do_those_in_its_own_sources(source, conversation):
    messages = CONVERSATIONS[conversation]
    assert ours(source, messages, tools=TOOLS) == theirs(source, messages, tools=TOOLS)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_so_does_the_shipped_models(conversation, smollm2_path):
    source = Tokenizer.load(smollm2_path).chat_template
    written = ours(source, CONVERSATIONS[conversation])
    assert written == theirs(source, CONVERSATIONS[conversation])
    assert isinstance(written, str)


@pytest.mark.parametrize("escape", ESCAPES)
def test_what_leads_out_of_the_sandbox_there_does_not_here(escape):
    source = ESCAPES[escape]
    written = ours(source, CONVERSATIONS["several turns"])
    assert written == theirs(source, CONVERSATIONS["several turns"])
    assert isinstance(written, type) or written == ""


def test_rendering_needs_no_transformers():
    code = (
        "import sys; from helix_gateway.text.chat_template import ChatTemplate;"
        "print(ChatTemplate('{{ messages[0].content }}', {}).render([{'content': 'a'}]),"
        " [name for name in sys.modules if name.partition('.')[0] in ('transformers', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "a []\n"
