"""README's examples, run as they stand there: against a server that is running, and as a library."""

import ast
import asyncio
import inspect
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
CURLS = [text for language, text in BLOCKS if not language and text.startswith("curl ")]
PYTHON = [text for language, text in BLOCKS if language == "python"]
LIBRARY = [text for text in PYTHON if "engine" in text]
CLIENTS = [text for text in PYTHON if "base_url" in text]


def aimed_at(server, text):
    """An example with the tests' server in place of the reader's."""
    return text.replace("http://127.0.0.1:8000", server.url).replace("SmolLM2-135M-Instruct", "smollm2")


async def run(source, names):
    """Run lines that may await, as in a notebook; gives ``names`` what they define."""
    code = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.isawaitable(result):
        await result


def test_every_example_is_of_a_kind_that_is_tested():
    assert CURLS
    assert CLIENTS
    assert sorted(LIBRARY + CLIENTS) == sorted(PYTHON)


@pytest.mark.parametrize("text", CURLS, ids=lambda text: text.split()[1])
def test_what_curl_asks_is_answered(server, text):
    words = shlex.split(aimed_at(server, text).replace("\\\n", " "))
    done = subprocess.run([*words, "--silent", "--show-error", "--fail-with-body"], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "error" not in json.loads(done.stdout)


@pytest.mark.parametrize("text", CLIENTS, ids=lambda text: text.split()[1])
def test_what_clients_in_python_ask_is_answered(server, text, capsys):
    asyncio.run(run(aimed_at(server, text), {}))
    assert len(capsys.readouterr().out.strip()) > 5


def test_the_library_answers_and_streams(smollm2_path, capsys):
    first, *others = LIBRARY
    lines = [line for text in others for line in text.splitlines()]
    # The other examples go on with the first one's engine, inside its block.
    asyncio.run(run(first + "".join(f"    {line}\n" for line in lines), {}))
    printed = capsys.readouterr().out
    assert "Paris" in printed
    # The first ends with its seconds; what is streamed then may end with empty lines.
    _, streamed = re.split(r"\d\.\d{4,}\S*\n", printed, maxsplit=1)
    assert len(streamed.strip()) > 5
