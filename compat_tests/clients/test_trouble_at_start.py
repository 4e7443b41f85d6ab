"""What can go wrong before anything is served is one clear line and an exit code, never a traceback."""

import socket
import subprocess
import sys

import httpx
import pytest

from compat_tests.serving import start_server, stop_server
from helix_gateway.service.tiny_model import write_tiny_model


def serve(*arguments):
    command = [sys.executable, "-m", "helix_gateway", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    lines = [line for line in done.stderr.splitlines() if line.startswith("helix: ")]
    assert "Traceback" not in done.stderr
    assert done.returncode != 0
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_port_in_use(smollm2_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"{port}" in serve(smollm2_path, "--port", str(port))


def test_a_host_that_is_nowhere(smollm2_path):
    assert "no-such-host.invalid" in serve(smollm2_path, "--host", "no-such-host.invalid")


def test_a_model_that_is_not_there():
    assert "no-such-file.gguf" in serve("/no-such-file.gguf", "--port", "0")


@pytest.mark.parametrize("size", [0, 1000, 5_000_000])
def test_a_model_file_that_is_cut_short(smollm2_path, tmp_path, size):
    broken = tmp_path / "broken.gguf"
    with open(smollm2_path, "rb") as whole:
        broken.write_bytes(whole.read(size))
    assert "broken.gguf" in serve(str(broken), "--port", "0")


def test_a_folder_that_holds_no_model(tmp_path):
    assert str(tmp_path) in serve(str(tmp_path), "--port", "0")


def test_a_context_longer_than_the_model_was_made_for(smollm2_path):
    assert "8192" in serve(smollm2_path, "--port", "0", "--max-model-len", "9000")


def test_a_cache_that_does_not_hold_a_block(smollm2_path):
    said = serve(smollm2_path, "--port", "0", "--kv-cache-memory", "512KiB", "--dtype", "float32")
    assert "0.5 MiB were given, but one block of 16 tokens takes 0.703 MiB. Raise --kv-cache-memory" in said


@pytest.fixture
def unwritable(tmp_path, monkeypatch):
    """Lets the cache folder be where no folder can be, and temporary ones in a place that is answered."""
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def not_kept(unwritable):
    return (
        f"helix: compiled kernels cannot be kept in {unwritable.parent / 'file' / 'cache' / 'compiled'}: Not a directory; "
        "each start compiles them anew, for up to a minute: set HELIX_CACHE or NUMBA_CACHE_DIR to a folder that can be written"
    )


def test_a_cache_folder_that_cannot_be_written_is_said_and_leaves_nothing(unwritable):
    command = [sys.executable, "-m", "helix_gateway", "serve", "/no-such-file.gguf", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said, refused = done.stderr.splitlines()
    assert said == not_kept(unwritable)
    assert "no-such-file" in refused
    assert list(unwritable.iterdir()) == []


@pytest.mark.deep
def test_a_server_without_a_cache_folder_serves_and_leaves_nothing(unwritable, tmp_path):
    """All is compiled anew, so it takes a minute."""
    folder = tmp_path / "model"
    folder.mkdir()
    server = start_server(str(write_tiny_model(folder)), "--kv-cache-memory", "64MiB", timeout_s=400)
    try:
        (made,) = unwritable.glob("helix-compiled-*")
        assert list(made.rglob("*.nbc"))
        answer = httpx.post(f"{server.base_url}/completions", json={"prompt": "Hi", "max_tokens": 4}, timeout=100)
        assert answer.status_code == 200
    finally:
        assert stop_server(server) == 0
    assert [line for line in server.lines if line.startswith("helix: ")] == [not_kept(unwritable)]
    assert list(unwritable.glob("helix-compiled-*")) == []


def test_a_device_that_is_not_there(smollm2_path):
    assert "cuda" in serve(smollm2_path, "--port", "0", "--device", "cuda")
