"""What a bare machine is given: which torch, when it is installed again, and what is said where it cannot be."""

import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import environment  # noqa: E402
from environment import Machine, SetupError, torch_plan  # noqa: E402


def machine(system="Linux", arch="x86_64", python=(3, 11), gpu=None):
    return Machine(system, arch, python, gpu)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A made-up repository whose environment and pip are only written about."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "STAMP", tmp_path / ".venv" / "stamp.json")
    monkeypatch.setattr(environment, "LOG", tmp_path / ".venv" / "log")
    (tmp_path / "pyproject.toml").write_text("[project]")
    environment.venv_python().parent.mkdir(parents=True)
    environment.venv_python().touch()
    return tmp_path


@pytest.fixture
def pip_calls(checkout, monkeypatch):
    """Every ``pip install``, which always succeeds here."""
    calls = []
    monkeypatch.setattr(environment, "make_venv", lambda: None)
    monkeypatch.setattr(environment, "pip_version", lambda: (25, 0))
    monkeypatch.setattr(environment, "inspect_machine", machine)
    monkeypatch.setattr(environment, "torch_version", lambda: None)
    monkeypatch.setattr(environment, "reachable", lambda url: True)
    monkeypatch.setattr(environment, "pip_install", lambda title, arguments: calls.append(arguments) or True)
    monkeypatch.setattr(environment, "compile_modules", lambda: None)
    return calls


def test_torch_is_never_asked_for_without_its_version():
    everything = itertools.product(
        ["Linux", "Windows", "Darwin"], ["x86_64", "AMD64", "arm64"], [(3, 10), (3, 14)], ["nvidia", "amd", None]
    )
    for system, arch, python, gpu in everything:
        if system == "Darwin" and arch != "arm64":
            continue
        plan = torch_plan(Machine(system, arch, python, gpu))
        assert plan.requirement in {"torch==2.13.0", "torch==2.4.1"}


@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_a_laptop_without_a_gpu_is_sent_to_the_cpu_index_first(system):
    plan = torch_plan(machine(system))
    assert plan.first_index.endswith("/whl/cpu")
    assert plan.requirement == "torch==2.13.0"


def test_an_nvidia_gpu_gets_a_cuda_build():
    assert torch_plan(machine(gpu="nvidia")).first_index is None
    assert "/whl/cu" in torch_plan(machine("Windows", gpu="nvidia")).first_index


def test_an_amd_gpu_on_windows_gets_directml_with_its_own_torch():
    plan = torch_plan(machine("Windows", "AMD64", gpu="amd"))
    assert (plan.requirement, plan.extra) == ("torch==2.4.1", "directml")


def test_an_amd_gpu_gets_no_directml_where_there_is_none():
    assert torch_plan(machine("Windows", "AMD64", (3, 13), "amd")).extra is None
    assert torch_plan(machine(gpu="amd")).extra is None


def test_an_intel_mac_is_told_why_it_cannot_be_served():
    with pytest.raises(SetupError, match="Intel Macs"):
        torch_plan(machine("Darwin", "x86_64"))
    assert torch_plan(machine("Darwin", "arm64")).first_index is None


@pytest.mark.parametrize(
    "version,stays",
    [(None, False), ("2.3.1", False), ("2.4.1", True), ("2.10.0+rocm6.4", True), ("2.9.1+cpu", True), ("3.0", True)],
)
def test_a_torch_that_is_new_enough_stays(version, stays):
    assert environment.installed_torch_suits(version, torch_plan(machine())) is stays


def test_directml_takes_no_other_torch_than_its_own():
    plan = torch_plan(machine("Windows", "AMD64", gpu="amd"))
    assert environment.installed_torch_suits("2.4.1+cpu", plan)
    assert not environment.installed_torch_suits("2.13.0", plan)


def test_a_silent_cpu_index_leads_to_the_ordinary_one_with_the_version_pinned(pip_calls, monkeypatch):
    monkeypatch.setattr(environment, "reachable", lambda url: False)
    environment.ensure()
    assert pip_calls == [["torch==2.13.0"], ["torch==2.13.0", "--editable", "."]]


def test_a_cpu_index_that_fails_midway_leads_to_the_ordinary_one(pip_calls, monkeypatch):
    def install(title, arguments):
        pip_calls.append(arguments)
        return "--index-url" not in arguments

    monkeypatch.setattr(environment, "pip_install", install)
    environment.ensure()
    assert pip_calls[0][:2] == ["--index-url", environment.CPU_INDEX]
    assert pip_calls[1] == ["torch==2.13.0"]


def test_an_index_whose_name_is_never_found_costs_no_more_than_the_timeout(monkeypatch):
    given_up, ended = threading.Event(), threading.Event()

    def look_up(*_, **__):
        given_up.wait(30)
        ended.set()
        raise OSError("the name is not known")

    monkeypatch.setattr(environment.urllib.request, "urlopen", look_up)
    assert environment.reachable("https://index.invalid", timeout_s=0.05) is False
    # Whoever looks the name up must not outlive the test, and trouble some other.
    given_up.set()
    assert ended.wait(30)


def test_a_second_run_installs_nothing(pip_calls):
    environment.ensure(["dev"])
    pip_calls.clear()
    environment.ensure(["dev"])
    environment.ensure()
    assert pip_calls == []


def test_more_extras_or_other_requirements_install_again(pip_calls, checkout):
    environment.ensure()
    environment.ensure(["dev"])
    assert pip_calls[-1][-1] == ".[dev]"
    (checkout / "pyproject.toml").write_text("[project]\nname = 'changed'")
    pip_calls.clear()
    environment.ensure()
    assert pip_calls


def test_an_interrupted_installation_is_not_taken_for_a_finished_one(pip_calls, monkeypatch, capsys):
    environment.ensure()

    def install(title, arguments):
        environment.LOG.write_text("ERROR: No space left on device\n")
        return False

    monkeypatch.setattr(environment, "pip_install", install)
    with pytest.raises(SetupError, match="pip could not install"):
        environment.install("key", [])
    assert not environment.STAMP.exists()
    assert "No space left" in capsys.readouterr().err


def test_an_installation_is_stamped_once_its_modules_are_compiled(pip_calls, monkeypatch):
    stamped = []
    monkeypatch.setattr(environment, "compile_modules", lambda: stamped.append(environment.STAMP.exists()))
    environment.ensure()
    assert stamped == [False]
    assert environment.STAMP.exists()


def test_modules_are_compiled_on_one_core_where_several_cannot_be_had(checkout, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(environment, "run_logged", lambda activity, command: commands.append(command[2]))
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 128)
    environment.compile_modules()
    assert [command.rpartition("workers=")[2] for command in commands] == ["8)", "1)"]
    assert "could not be compiled now" in capsys.readouterr().out


def test_modules_are_compiled_but_for_those_of_another_python(checkout, monkeypatch):
    """Nothing that pip installs is compiled by it; one module that cannot be stops none of the others."""
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", environment.VENV], check=True)
    [packages] = environment.VENV.rglob("site-packages")
    (packages / "sound.py").write_text("x = 1\n")
    (packages / "strange.py").write_text("f(: no Python knows this\n")
    own = environment.ROOT / "helix_gateway" / "engine" / "own.py"
    own.parent.mkdir(parents=True)
    own.write_text("x = 1\n")
    environment.compile_modules()
    assert [path.name.split(".")[0] for path in packages.rglob("*.pyc")] == ["sound"]
    assert [path.name.split(".")[0] for path in own.parent.rglob("*.pyc")] == ["own"]


def test_a_broken_stamp_means_installing_again(pip_calls):
    environment.STAMP.write_text(json.dumps(["nonsense"]))
    environment.ensure()
    assert pip_calls


def test_a_python_without_ensurepip_is_told_what_to_install(checkout, monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="python3-venv"):
        environment.make_venv()


def test_an_old_python_is_told_so(monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 9, 18))
    with pytest.raises(SetupError, match=r"3\.10 or newer"):
        environment.ensure()


def test_pip_output_becomes_progress_and_loses_what_is_harmless(capsys):
    activity = environment.Activity("Installing")
    assert environment.read_line(activity, "WARNING: Location 'file:///x/' is ignored: it is neither\n") == ""
    assert environment.read_line(activity, "Progress 50 of 200\n") == ""
    assert activity.fraction == 0.25
    assert environment.read_line(activity, "Collecting numba\n") == "Collecting numba\n"
    assert (activity.detail, activity.fraction) == ("Collecting numba", None)
    environment.read_line(activity, f"Installing collected packages: {'wheel, ' * 99}torch\n")
    assert activity.detail == "Installing packages: 100"


def test_a_step_of_pip_loses_where_things_come_from_and_is_never_cut_inside_a_word():
    assert environment.shortened("Collecting typer>=0.12.5 (from helix-gateway==0.1.0)") == "Collecting typer>=0.12.5"
    step = "Downloading https://files.example.org/packages/ab/cd/torch-2.13.0-cp311.whl.metadata (31 kB)"
    assert environment.shortened(step) == "Downloading torch-2.13.0-cp311.whl.metadata (31 kB)"
    long = environment.shortened("Collecting " + "extraordinary " * 9)
    assert long.endswith("extraordinary ...")
    assert len(long) <= environment.DETAIL_WIDTH


def test_a_line_on_a_narrow_terminal_ends_with_a_whole_word(monkeypatch):
    shown = []
    monkeypatch.setenv("COLUMNS", "55")
    activity = environment.Activity("Installing Helix")
    monkeypatch.setattr(activity, "_show", lambda line, end: shown.append(line))
    monkeypatch.setattr(activity, "_elapsed", lambda: "12 min 7 s")  # it has not begun, and the line's length counts
    activity.detail = "Collecting numba numpy numexpr"
    activity._redraw(0)
    assert shown[0].endswith("Collecting numba ...")
    assert len(shown[0]) < 55


def test_a_long_part_says_when_it_starts_and_ends_without_a_terminal(capsys):
    with environment.Activity("Making .venv"):
        pass
    with pytest.raises(KeyError), environment.Activity("Installing"):
        raise KeyError
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Making .venv ..."
    assert lines[1].startswith("Making .venv: done (")
    assert lines[3].startswith("Installing: failed (")


def test_trouble_is_one_line_and_a_failing_exit_code(capsys):
    def main():
        raise SetupError("the disk is full")

    with pytest.raises(SystemExit) as stopped:
        environment.run_script(main)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: the disk is full\n"


def failed(check, monkeypatch, capfd):
    """What a run of the checks prints, one of which fails."""
    monkeypatch.setattr(check.environment, "ensure", lambda extras: Path(sys.executable))
    monkeypatch.setattr(check.chromium, "ensure", lambda python: "no browser here")
    monkeypatch.setattr(sys, "argv", ["check.py"])
    assert check.main() == 1
    return capfd.readouterr().out


def only(check, monkeypatch, commands, compiling="pass"):
    """Let `check.py` run those commands and nothing else."""
    monkeypatch.setattr(check, "linters", lambda python: commands)
    monkeypatch.setattr(check, "compiling", lambda python: [sys.executable, "-c", compiling])
    monkeypatch.setattr(check, "tests", lambda python: {})


def test_kernels_are_compiled_beside_the_linters_and_trouble_with_them_is_told(tmp_path, monkeypatch, capfd):
    import check

    # Each waits for the other: that ends only where they run at once.
    waiting = "import pathlib, sys, time\nmine, other = map(pathlib.Path, {!r})\nmine.touch()\n"
    waiting += "while not other.exists(): time.sleep(0.01)\n"
    ours, theirs = str(tmp_path / "a"), str(tmp_path / "b")
    linter = [sys.executable, "-c", waiting.format((ours, theirs))]
    only(check, monkeypatch, {"linter": linter}, waiting.format((theirs, ours)) + "sys.exit('no compiler')")
    out = failed(check, monkeypatch, capfd)
    assert "=== linter: passed" in out
    assert "no compiler\n=== kernels: FAILED (exit code 1)" in out


def test_every_test_is_run_once(monkeypatch):
    import check

    monkeypatch.setattr(check.os, "cpu_count", lambda: 1)
    one_by_one = check.tests(Path("python"))
    monkeypatch.setattr(check.os, "cpu_count", lambda: 2)
    beside = check.tests(Path("python"))
    assert [command[-2:] for command in beside.values()] == [["-m", "not alone"], ["-m", "alone"]]
    assert beside["tests, alone"] == one_by_one["tests, alone"]
    assert beside["tests"] == [*one_by_one["tests"][:-2], "-n", "2", "--dist", "loadfile", "-m", "not alone"]


def test_the_checks_go_on_after_one_that_fails(tmp_path, monkeypatch, capfd):
    import check

    commands = {"first": [sys.executable, "-c", "exit(3)"], "second": [sys.executable, "-c", "print('ran')"]}
    only(check, monkeypatch, commands)
    out = failed(check, monkeypatch, capfd)
    assert "ran" in out
    assert "FAILED (exit code 3)" in out


@pytest.mark.parametrize("missing", [None, "no browser here"])
def test_web_pages_that_are_not_tested_are_said_so_aloud(missing, monkeypatch, capfd):
    import check

    monkeypatch.setattr(check, "BROWSER_TESTS", "--version")
    only(check, monkeypatch, {})
    monkeypatch.setattr(check.environment, "ensure", lambda extras: Path(sys.executable))
    monkeypatch.setattr(check.chromium, "ensure", lambda python: missing)
    monkeypatch.setattr(sys, "argv", ["check.py"])
    assert check.main() == 0
    summary = capfd.readouterr().out
    assert ("=== browser: passed" in summary) == (missing is None)
    assert ("SKIPPED: no browser here" in summary and "were NOT tested" in summary) == (missing is not None)


def test_a_chromium_is_fetched_where_none_starts_and_the_next_way_is_tried_where_one_fails(checkout, monkeypatch):
    import chromium

    ran = []

    def run_limited(command, limit_s):
        ran.append(command[0])
        return command[0] == "second"

    monkeypatch.setattr(chromium, "run_limited", run_limited)
    monkeypatch.setattr(chromium, "ways", lambda python: [("one", ["first"]), ("two", ["second"])])
    monkeypatch.setattr(chromium, "starts", lambda python: "second" in ran)
    assert chromium.ensure(Path(sys.executable)) is None
    assert ran == ["first", "second"]
    monkeypatch.setattr(chromium, "starts", lambda python: False)
    assert "none could be fetched" in chromium.ensure(Path(sys.executable))


def test_a_tool_that_hangs_or_is_missing_is_a_way_that_failed(checkout):
    import chromium

    assert not chromium.run_limited([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    assert not chromium.run_limited(["no-such-tool"], 5)
    assert chromium.run_limited([sys.executable, "-c", "print('said')"], 30)
    assert "said" in environment.LOG.read_text()


@pytest.mark.parametrize("arguments,told", [([], None), (["--deep"], "1")])
def test_deep_checks_are_the_same_checks_at_a_higher_setting(arguments, told, monkeypatch, capfd):
    import check

    monkeypatch.delenv("HELIX_TEST_DEEP", raising=False)
    show = [sys.executable, "-c", "import os; print('deep:', os.environ.get('HELIX_TEST_DEEP'))"]
    only(check, monkeypatch, {"only": show})
    monkeypatch.setattr(check.environment, "ensure", lambda extras: Path(sys.executable))
    monkeypatch.setattr(check.chromium, "ensure", lambda python: "no browser here")
    monkeypatch.setattr(sys, "argv", ["check.py", *arguments])
    assert check.main() == 0
    assert f"deep: {told}" in capfd.readouterr().out


@pytest.mark.parametrize("script", ["quickstart", "check"])
def test_the_scripts_need_nothing_but_the_standard_library(script):
    code = "import sys; sys.path.insert(0, sys.argv[1]); __import__(sys.argv[2])"
    command = [sys.executable, "-I", "-S", "-c", code, str(SCRIPTS), script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
