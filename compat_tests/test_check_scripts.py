"""The scripts that look at a machine, a model and the package: each run as a person would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helix_gateway.service.tiny_model import write_tiny_model

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import arm_check  # noqa: E402


def script(name, *arguments, flags=()):
    command = [sys.executable, *flags, str(SCRIPTS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_the_hardware_is_told_with_the_standard_library_alone():
    done = script("hardware_check.py", flags=("-S", "-I"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "torch            not installed" in done.stdout
    for thing in ("system", "processor", "cores", "instruction sets", "memory", "gpu"):
        assert f"\n{thing} " in "\n" + done.stdout


def test_the_hardware_is_told_as_json_too():
    told = json.loads(script("hardware_check.py", "--json").stdout)
    assert told["cores"] >= told["usable_cores"] >= 1
    assert told["packages"]["torch"]


@pytest.mark.parametrize(
    "words, has, lacks",
    [
        ((0x8FB, 0), {"fp", "asimd", "crc32"}, {"asimddp", "i8mm", "atomics"}),
        ((0x119FFB, 0), {"asimd", "atomics", "asimddp"}, {"i8mm", "sve"}),
        ((0xECFFFFFB, 0x7F877FFF), {"asimd", "asimddp", "sve", "i8mm", "bf16"}, set()),
    ],
    ids=["cortex-a57", "cortex-a76", "max"],
)
def test_an_emulated_processor_is_told_of_as_linux_would(words, has, lacks):
    told = set(arm_check.capabilities(*words))
    assert has <= told
    assert not lacks & told


@pytest.fixture
def tiny(tmp_path):
    return str(write_tiny_model(tmp_path))


def test_a_model_that_loads_tells_its_shape_its_cost_and_an_answer(tiny):
    done = script("model_load_check.py", tiny, "--max-tokens", "3", "--prompt", "Hello")
    assert done.returncode == 0, done.stderr
    told = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "LlamaForCausalLM, 107,328 parameters, context 512" in told["shape"]
    assert "safetensors, F32" in told["weights"]
    assert " MB at the most" in told["loaded"]
    assert "512 tokens" in told["holds"]
    assert "3 tokens in" in done.stdout


def test_a_model_that_does_not_load_is_one_line_and_exit_code_1(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF?")
    done = script("model_load_check.py", str(tmp_path / "broken.gguf"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "broken.gguf" in done.stderr


def test_the_package_is_sound_where_torch_is_not_installed():
    done = script("validate.py", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report["wrong"]
    assert "helix_gateway.cli.main" in report["free"]
    assert "helix_gateway.gateway.app" in report["free"]
    assert "helix_gateway.runtime.runner" in report["need_torch"]


def test_what_is_not_sound_is_named_with_the_reason(tmp_path):
    for place, source in {
        "__init__.py": "",
        "cli/__init__.py": "",
        "cli/heavy.py": "import torch\n",
        "core/__init__.py": "",
        "core/broken.py": "def (:\n",
        "runtime/__init__.py": "",
        "runtime/device.py": "import torch\n",
        "runtime/odd.py": "raise ValueError('odd')\n",
        "runtime/lost.py": "import no_such_library\n",
    }.items():
        file = tmp_path / "helix_gateway" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    done = script(
        "validate.py", "--root", str(tmp_path), "--json", flags=("-P",) if sys.version_info >= (3, 11) else ()
    )
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["need_torch"] == ["helix_gateway.runtime.device"]
    reasons = {name.removeprefix("helix_gateway."): why for name, why in report["wrong"].items()}
    assert set(reasons) == {"cli.heavy", "core.broken", "runtime.odd"}
    assert "must not" in reasons["cli.heavy"]
    assert "SyntaxError" in reasons["core.broken"]
    assert "odd" in reasons["runtime.odd"]
    assert (report["untried"], report["missing"]) == (["helix_gateway.runtime.lost"], ["no_such_library"])


def test_modules_that_want_what_is_not_installed_are_one_line_that_says_what_to_do(tmp_path):
    (tmp_path / "helix_gateway").mkdir()
    for name in ("__init__", "one", "two"):
        (tmp_path / "helix_gateway" / f"{name}.py").write_text("import no_such_library\n")
    done = script("validate.py", "--root", str(tmp_path), flags=("-P",) if sys.version_info >= (3, 11) else ())
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("WRONG")]
    assert done.returncode == 1
    assert line.startswith("WRONG 3 modules could not be tried without no_such_library: install Helix first")
