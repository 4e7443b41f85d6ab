"""What an earlier start found out is used as long as nothing changed, and never afterwards."""

import json
import os

import pytest
from structlog.testing import capture_logs

from compat_tests.runtime.paged import turn_wrongly_from
from compat_tests.tiny_models import TINY_MODELS
from helix_gateway.runtime import probe, remembered
from helix_gateway.runtime.cpu.quantised_llama import QuantisedLlamaStep
from helix_gateway.runtime.factory import load_runner
from helix_gateway.runtime.remembered import Remembered, file_identities
from helix_gateway.runtime.runner import TransformersRunner


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own; compiled code stays where it is."""
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remembered"


@pytest.fixture
def folder(tmp_path):
    _, model = TINY_MODELS["llama"](0)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checks(monkeypatch):
    """How often a model was tried out, and how often its modules answered the trial."""
    counts = {"probes": 0, "modules": 0}
    find, through = probe.find_attention_layers, TransformersRunner._through_transformers

    def counted_probe(model):
        counts["probes"] += 1
        return find(model)

    def counted_modules(runner, batch):
        counts["modules"] += 1
        return through(runner, batch)

    monkeypatch.setattr(probe, "find_attention_layers", counted_probe)
    monkeypatch.setattr(TransformersRunner, "_through_transformers", counted_modules)
    return counts


def load(folder, **options):
    options = {"quantization": "int8", **options}
    return load_runner(str(folder), device="cpu", max_tokens_in_use=1000, **options).runner


def is_checked_anew(checks, load_again):
    """Whether a start asked the modules."""
    before = dict(checks)
    load_again()
    assert (checks["probes"] > before["probes"]) == (checks["modules"] > before["modules"])
    return checks["modules"] > before["modules"]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, patch: os.utime(folder / "model.safetensors", ns=(1, 1)),
        lambda folder, patch: (folder / "config.json").write_text((folder / "config.json").read_text() + "\n"),
        lambda folder, patch: patch.setattr(remembered, "code_digest", lambda folder: "other code"),
        lambda folder, patch: patch.setattr(remembered, "version", lambda library: "9.9"),
        lambda folder, patch: patch.setattr(remembered, "_processor_name", lambda: "another processor"),
        lambda folder, patch: patch.setenv("MKL_CBWR", "COMPATIBLE"),
    ],
    ids=["weights", "config", "code", "libraries", "processor", "variables"],
)
def test_whatever_could_change_the_verdict_has_it_made_anew(cache, folder, checks, monkeypatch, change):
    load(folder)
    assert not is_checked_anew(checks, lambda: load(folder))
    change(folder, monkeypatch)
    assert is_checked_anew(checks, lambda: load(folder))
    assert not is_checked_anew(checks, lambda: load(folder))


@pytest.mark.parametrize("options", [{"quantization": "int4"}, {"kv_cache_dtype": "float32"}, {"block_size": 8}])
def test_other_settings_have_verdicts_of_their_own(cache, folder, checks, options):
    load(folder)
    assert is_checked_anew(checks, lambda: load(folder, **options))


def test_a_file_that_was_put_back_with_its_old_times_is_another_file(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    before, times = file_identities(file), file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_identities(file) != before


def test_a_step_that_answers_otherwise_than_it_did_is_checked_whatever_is_remembered(
    cache, folder, checks, monkeypatch
):
    load(folder)
    turn_wrongly_from(0, QuantisedLlamaStep, monkeypatch)
    with capture_logs() as logs:
        runner = load(folder)
    assert [line["event"] for line in logs] == ["quick_start_failed", "compiled_step_changed", "compiled_step_refused"]
    assert not isinstance(runner._compute, QuantisedLlamaStep)


@pytest.mark.parametrize("damage", ["cut", "altered", "emptied", "of another kind"])
def test_a_damaged_file_is_ignored_with_a_line(cache, folder, checks, damage):
    load(folder)
    (file,) = cache.iterdir()
    text = file.read_text()
    damaged = {
        "cut": text[: len(text) // 2],
        "altered": text.replace('"vocab_size": ', '"vocab_size": 1'),
        "emptied": "",
        "of another kind": json.dumps([1, 2]),
    }
    file.write_text(damaged[damage])
    with capture_logs() as logs:
        assert is_checked_anew(checks, lambda: load(folder))
    assert [line["event"] for line in logs] == ["remembered_file_ignored"]
    assert not is_checked_anew(checks, lambda: load(folder))


def test_a_folder_that_cannot_be_written_costs_the_memory_only(tmp_path, folder, checks, monkeypatch):
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    assert is_checked_anew(checks, lambda: load(folder))
    assert is_checked_anew(checks, lambda: load(folder))


def test_no_more_than_the_latest_files_are_kept(tmp_path):
    for number in range(remembered._KEPT_FILES + 5):
        Remembered({"number": number}, tmp_path).put("found", number)
        os.utime(Remembered({"number": number}, tmp_path)._file, (number, number))
    assert len(list(tmp_path.iterdir())) == remembered._KEPT_FILES
    assert Remembered({"number": 0}, tmp_path).get("found") is None
    assert Remembered({"number": remembered._KEPT_FILES + 4}, tmp_path).get("found") is not None


def test_what_is_kept_is_read_as_json_would_write_it(tmp_path):
    kept = Remembered({"number": 1}, tmp_path)
    kept.put("seconds", {1: 0.5, 10: (1, 2), 2: None})
    with capture_logs() as logs:
        read = Remembered({"number": 1}, tmp_path)
    assert read.get("seconds") == kept.get("seconds") == {"1": 0.5, "10": [1, 2], "2": None}
    assert not logs
