"""A server that has served a model before starts without transformers, in either of its processes, and answers the same."""

import os
import textwrap

import httpx
import pytest

from compat_tests.serving import start_server, stop_server
from helix_gateway.service.tiny_model import write_tiny_model

STUB = """
import os, pathlib
with open({list!r}, "a") as file:
    file.write(f"{{os.getpid()}}\\n")
raise ImportError("transformers is not here")
"""


@pytest.fixture
def forbidden(tmp_path, monkeypatch):
    """Forbids transformers to processes started from now on, in the place of its modules; says who asked for it."""

    def forbid():
        package = tmp_path / "stub" / "transformers"
        package.mkdir(parents=True)
        asked = tmp_path / "asked"
        (package / "__init__.py").write_text(textwrap.dedent(STUB.format(list=str(asked))))
        path = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH", os.getcwd())])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
        return asked

    return forbid


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own; compiled code stays where it is."""
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))


def answers(client):
    """A chat's and a completion's, greedy and with a seed."""
    chat = {"model": "model", "max_tokens": 20, "temperature": 0, "messages": [{"role": "user", "content": "Hi!"}]}
    prompt = {"model": "model", "max_tokens": 20, "seed": 5, "prompt": "Once", "logprobs": 2}
    answered = client.post("/chat/completions", json=chat), client.post("/completions", json=prompt)
    return [answer.json()["choices"][0] for answer in answered]


def served(path):
    """What a server answers, and what it says of itself."""
    running = start_server(str(path), "--kv-cache-memory", "64MiB", "--served-model-name", "model")
    try:
        with httpx.Client(base_url=running.base_url, timeout=120) as client:
            return answers(client), running.lines
    finally:
        assert stop_server(running) == 0


def assert_starts_without_transformers(path, forbidden):
    first, _ = served(path)
    asked = forbidden()
    second, lines = served(path)
    assert second == first
    assert not asked.exists(), asked.read_text()
    assert not [line for line in lines if "warning" in line or "quick_start_failed" in line]


def test_a_tiny_model(tmp_path, forbidden):
    folder = tmp_path / "model"
    folder.mkdir()
    assert_starts_without_transformers(write_tiny_model(folder), forbidden)


def test_the_shipped_model(smollm2_path, forbidden):
    assert_starts_without_transformers(smollm2_path, forbidden)


def test_the_stub_is_seen_where_transformers_is_needed(tmp_path, forbidden):
    folder = tmp_path / "model"
    folder.mkdir()
    write_tiny_model(folder)
    asked = forbidden()
    with pytest.raises(AssertionError, match="transformers is not here"):
        start_server(str(folder), "--kv-cache-memory", "64MiB")
    assert asked.exists()
