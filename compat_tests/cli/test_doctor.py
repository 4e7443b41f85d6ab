"""``helix doctor``: what is well is said so, what is wrong comes with advice, and a crash is a finding too."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from helix_gateway.cli.doctor import checks, examination
from helix_gateway.cli.main import app
from helix_gateway.runtime.cpu.compile_cache import use_compile_cache
from helix_gateway.runtime.cpu.integer_dot import host_dot
from helix_gateway.runtime.cpu.quantised_products import FEW_ROWS
from helix_gateway.runtime.hardware import Gpu, Hardware, inspect_hardware
from helix_gateway.runtime.sources.default_model import DEFAULT_MODEL_BYTES
from helix_gateway.service.findings import Finding
from helix_gateway.service.self_test import SMOLLM2_ANSWER, SMOLLM2_PROMPT, TINY_ANSWER, TINY_PROMPT
from helix_gateway.service.self_test_process import run_self_test
from helix_gateway.service.tiny_model import write_tiny_model

GB = 10**9


def machine(**changes):
    usual = {
        "system": "Linux 6", "machine": "x86_64", "processor": "A processor", "cores": 8, "usable_cores": 8,
        "instruction_sets": ("avx2", "fma"), "memory_bytes": 16 * GB, "available_bytes": 8 * GB, "gpus": (), "load": 0.1,
    }  # fmt: skip
    return Hardware(**{**usual, **changes})


def greedy(path, prompt_ids, new_tokens):
    """transformers' own answer in float32."""
    import torch

    from helix_gateway.runtime.loading import load_model

    model = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
    output = model.generate(
        torch.tensor([prompt_ids]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    return tuple(output[0, len(prompt_ids) :].tolist())


def test_a_machine_without_the_default_model_is_examined_with_a_tiny_one(tmp_path):
    use_compile_cache()  # where other tests' kernels are, since the folder named next has none
    environment = {**os.environ, "HELIX_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "helix_gateway", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, findings
    assert findings["default model"]["state"] == "warning"
    assert "helix models pull" in findings["default model"]["advice"]
    assert findings["answer"]["state"] == "ok"
    gb_per_s, most = re.findall(r"([\d.]+) GB/s|([\d.]+) tokens/s", findings["memory bandwidth"]["said"])
    rounding = 0.05e9 / DEFAULT_MODEL_BYTES + 0.5  # of both figures
    assert float(most[1]) == pytest.approx(float(gb_per_s[0]) * 1e9 / DEFAULT_MODEL_BYTES, abs=1.01 * rounding)
    assert findings["kernels"]["said"].startswith(f"{host_dot()}: ")
    assert f"up to {FEW_ROWS} rows" in findings["kernels"]["said"]
    assert "tokens/s" in findings["speed"]["said"]
    assert {"device", "start", "compiled kernels", "threads", "processor", "port"} <= set(findings)


def test_the_tiny_model_s_stored_answer_is_the_one_of_transformers(tmp_path):
    from helix_gateway.text.tokenizer import Tokenizer

    path = str(write_tiny_model(tmp_path))
    prompt = Tokenizer.load(path).encode(TINY_PROMPT)
    assert greedy(path, prompt, len(TINY_ANSWER)) == TINY_ANSWER


@pytest.mark.deep
def test_the_default_model_s_stored_answer_is_the_one_of_transformers(smollm2_path):
    from helix_gateway.text.tokenizer import Tokenizer

    prompt = Tokenizer.load(smollm2_path).encode(SMOLLM2_PROMPT)
    assert greedy(smollm2_path, prompt, len(SMOLLM2_ANSWER)) == SMOLLM2_ANSWER


@pytest.fixture
def shown(monkeypatch):
    """What the command prints where the examination finds this."""

    def show(*findings, arguments=()):
        monkeypatch.setattr(examination, "examine_machine", lambda: iter(findings))
        monkeypatch.setattr(examination, "examine_places", lambda port: iter(()))
        return CliRunner().invoke(app, ["doctor", "--no-self-test", *arguments])

    return show


def test_problems_come_with_advice_and_exit_code_1(shown):
    result = shown(Finding("a", "ok", "fine"), Finding("b", "problem", "broken", "Mend it."))
    assert result.exit_code == 1
    assert "Mend it." in result.output
    assert "1 problem, no warnings" in result.output


def test_warnings_alone_are_no_failure(shown):
    result = shown(Finding("a", "warning", "odd", "Look."))
    assert result.exit_code == 0
    assert "no problems, 1 warning." in result.output


def test_json_holds_every_finding(shown):
    result = shown(Finding("a", "problem", "odd", "Look."), arguments=["--json"])
    assert result.exit_code == 1
    assert json.loads(result.output)["findings"] == [
        {"name": "a", "state": "problem", "said": "odd", "advice": "Look."}
    ]


def states(finding):
    return finding.state, finding.advice is not None


@pytest.mark.parametrize(
    "finding,state",
    [
        (checks.check_processor(machine()), "ok"),
        (checks.check_processor(machine(instruction_sets=("sse4_2",))), "warning"),
        (checks.check_processor(machine(machine="arm64", instruction_sets=("neon", "asimddp"))), "ok"),
        (checks.check_processor(machine(machine="aarch64", instruction_sets=("neon",))), "warning"),
        (checks.check_processor(machine(machine="ARM64", instruction_sets=())), "ok"),
        (checks.check_load(machine()), "ok"),
        (checks.check_load(machine(load=9.0)), "warning"),
        (checks.check_memory(machine()), "ok"),
        (checks.check_memory(machine(available_bytes=GB)), "warning"),
        (checks.check_memory(machine(available_bytes=None)), "ok"),
        (checks.check_gpus(machine(), "2.13.0+cpu")[0], "ok"),
        (checks.check_gpus(machine(gpus=(Gpu("nvidia", "H100", 80 * GB, "570"),)), "2.13.0+cpu")[0], "warning"),
        (checks.check_gpus(machine(gpus=(Gpu("nvidia", "H100", 80 * GB, "570"),)), "2.13.0+cu130")[0], "ok"),
        (checks.check_gpus(machine(gpus=(Gpu("amd", "RX 7900", None, None),)), "2.13.0+cpu")[0], "warning"),
        (checks.check_gpus(machine(gpus=(Gpu("apple", "GPU of the M3", None, None),)), "2.13.0")[0], "ok"),
        (checks.check_packages({"torch": "2.13.0+cpu", "numba": "0.68.1"})[0], "ok"),
        (checks.check_packages({"torch": None})[0], "problem"),
        (checks.check_packages({"torch": "2.3.1"})[0], "problem"),
        (checks.check_cache(Path("/c"), True, 10 * GB), "ok"),
        (checks.check_cache(Path("/c"), False, None), "problem"),
        (checks.check_cache(Path("/c"), True, 1000), "warning"),
        (checks.check_default_model(Path("/m"), True), "ok"),
        (checks.check_port(8000, None), "ok"),
        (checks.check_port(8000, "Address already in use"), "warning"),
    ],
)  # fmt: skip
def test_each_thing_is_judged_and_what_is_not_well_has_advice(finding, state):
    assert states(finding) == (state, state != "ok")


def test_fewer_cores_than_there_are_is_said():
    assert "2 of 8 cores" in checks.check_processor(machine(usable_cores=2)).said


def test_a_port_in_use_and_a_folder_that_cannot_be_written_are_found(tmp_path, monkeypatch):
    place = tmp_path / "file"
    place.touch()
    monkeypatch.setenv("HELIX_CACHE", str(place / "below"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = {finding.name: finding for finding in examination.examine_places(server.getsockname()[1])}
    assert found["port"].state == "warning"
    assert found["cache"].state == "problem"


def test_this_machine_is_told_as_it_is():
    hardware = inspect_hardware()
    assert 1 <= hardware.usable_cores <= hardware.cores == os.cpu_count()
    assert hardware.processor
    assert 0 < hardware.available_bytes <= hardware.memory_bytes


@pytest.mark.parametrize(
    "code,said",
    [
        ("import os; os.kill(os.getpid(), 4)", "signal 4"),
        ("import sys; sys.exit('no such luck')", "no such luck"),
        ("import time; time.sleep(60)", "not done within"),
    ],
)
def test_a_self_test_that_dies_or_hangs_is_a_problem_after_what_it_had_found(code, said):
    first = """print('noise'); print('{"name": "a", "state": "ok", "said": "fine"}', flush=True); """
    found = list(run_self_test(1.5, [sys.executable, "-c", first + code]))
    assert found[0] == Finding("a", "ok", "fine")
    assert found[1].state == "problem"
    assert said in found[1].said
    assert found[1].advice


@pytest.mark.parametrize("share,state", [(1.5, "ok"), (0.9, "ok"), (0.1, "warning")])
def test_speed_is_told_beside_what_memory_would_allow(share, state, tmp_path):
    """A file of 10 MB at 1 GB/s: at most 100 tokens a second."""
    from helix_gateway.service import self_test

    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(10**7))
    trial = self_test._Trial("a model", str(file), "Hello", ())
    times_s = [place / (100 * share) for place in range(10)]
    result = SimpleNamespace(metrics=SimpleNamespace(token_times_s=times_s))
    finding = self_test._speed(trial, result, 1.0)
    assert finding.state == state
    assert f"{100 * share:.0f} tokens/s" in finding.said
    assert "of 100 that memory would allow without speculation" in finding.said
    assert ("drafts came on top" in finding.said) == (share > 1)
    assert (finding.advice is None) == (state == "ok")


def test_a_wrong_answer_is_a_problem(monkeypatch, tmp_path):
    from helix_gateway.service import self_test

    monkeypatch.setenv("HELIX_CACHE", str(tmp_path))
    monkeypatch.setattr(self_test, "TINY_ANSWER", (1, *TINY_ANSWER[1:]))
    monkeypatch.setattr(self_test, "_bandwidth_gb_per_s", lambda threads: 10.0)
    found = {finding.name: finding for finding in self_test.findings()}
    assert found["answer"].state == "problem"
    assert "report" in found["answer"].advice
