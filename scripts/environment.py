"""Makes ``.venv`` beside this folder and puts Helix with the right torch into it; shared by the scripts here.

Standard library only, since it runs before anything is installed.  Knows nothing about models or tests.
Which torch a machine gets is decided by pure functions (`torch_plan`), so that it can be tested on any machine:
a laptop must never be sent gigabytes of CUDA, and torch is never asked for without a version.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "helix-setup.json"
LOG = VENV / "helix-setup.log"

OLDEST_PYTHON = (3, 10)
TORCH = "torch==2.13.0"
TORCH_OLDEST = (2, 4, 1)
TORCH_DIRECTML = "torch==2.4.1"
PIP_WITH_READABLE_PROGRESS = (24, 1)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
REACH_TIMEOUT_S = 5.0
QUIET_LINE_EVERY_S = 30.0
LOG_LINES_SHOWN = 60
MOST_COMPILERS = 8
"""Processes; a container may have far fewer cores than its machine, which is asked."""
DETAIL_WIDTH = 72
LEAST_DETAIL_WIDTH = 12


class SetupError(Exception):
    """Set-up cannot go on; the message is one clear line for a person."""


@dataclass(frozen=True)
class Machine:
    """What decides which torch is installed."""

    system: str
    """``platform.system()``: "Linux", "Windows" or "Darwin"."""
    arch: str
    """``platform.machine()``: "x86_64", "AMD64", "arm64", "aarch64" ..."""
    python: tuple[int, int]
    gpu: str | None
    """"nvidia", "amd" or None."""


@dataclass(frozen=True)
class TorchPlan:
    """One torch for one machine."""

    requirement: str
    """Always with its version."""
    first_index: str | None
    """Package index tried before the ordinary one; None: the ordinary one at once."""
    extra: str | None
    """Extra of Helix that goes with it."""
    reason: str
    """Why, in words for a person."""


def torch_plan(machine: Machine) -> TorchPlan:
    """Choose the torch build that suits a machine.

    Raises:
        SetupError: there is none for it.
    """
    if machine.system == "Darwin":
        if machine.arch != "arm64":
            raise SetupError("PyTorch stopped building for Intel Macs at 2.2, and Helix needs 2.4.1 or newer.")
        return TorchPlan(TORCH, None, None, "Apple's GPU is in the ordinary build")
    if machine.gpu == "nvidia":
        # The ordinary index has CUDA builds for Linux and CPU builds for Windows.
        index = CUDA_INDEX if machine.system == "Windows" else None
        return TorchPlan(TORCH, index, None, "CUDA build for the NVIDIA GPU")
    if machine.gpu == "amd" and machine.system == "Windows" and machine.python < (3, 13):
        return TorchPlan(TORCH_DIRECTML, None, "directml", "DirectML for the AMD GPU")
    return TorchPlan(TORCH, CPU_INDEX, None, "CPU build: no GPU that torch could use")


def installed_torch_suits(version: str | None, plan: TorchPlan) -> bool:
    """Whether a torch that is there already (``2.9.1+rocm6.4``; None: there is none) can stay."""
    if version is None:
        return False
    if plan.extra is not None:
        return version.split("+")[0] == plan.requirement.split("==")[1]
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3]) >= TORCH_OLDEST


def inspect_machine() -> Machine:
    """Look at the machine that this runs on."""
    return Machine(platform.system(), platform.machine(), sys.version_info[:2], find_gpu())


def find_gpu() -> str | None:
    """Ask the drivers' own tools which GPU there is."""
    if "GPU " in output_of(["nvidia-smi", "-L"]):
        return "nvidia"
    if platform.system() == "Windows":
        names = output_of(["powershell", "-NoProfile", "-Command", "(Get-CimInstance Win32_VideoController).Name"])
        if re.search(r"\b(AMD|Radeon)\b", names):
            return "amd"
    return None


def output_of(command: Sequence[str]) -> str:
    """A tool's output; nothing where the tool is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def reachable(url: str, timeout_s: float = REACH_TIMEOUT_S) -> bool:
    """Whether a package index answers; looking up its name counts, which a socket's timeout would not bound."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{url}/torch/", timeout=timeout_s):  # noqa: S310 - an https constant
                answers.append(True)
        except (OSError, urllib.error.URLError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answers)


class Activity:
    """One long part of the work, as a line that tells what goes on and for how long.

    On a terminal the line is redrawn with a bar; elsewhere (a log, CI) there is a line at the start, one now and
    then, and one at the end.
    """

    FRAMES = "|/-\\"

    def __init__(self, title: str) -> None:
        self.title = title
        self.detail = ""
        self.fraction: float | None = None
        self._live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)
        self._start = 0.0

    def __enter__(self) -> Activity:
        """Begin to show it."""
        self._start = time.monotonic()
        if not self._live:
            print(f"{self.title} ...", flush=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the line: done, or failed."""
        self._done.set()
        self._thread.join()
        mark = "done" if kind is None else "failed"
        self._show(f"{self.title}: {mark} ({self._elapsed()})", "\n")

    def _elapsed(self) -> str:
        seconds = time.monotonic() - self._start
        return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"

    def _draw(self) -> None:
        frame = 0
        while not self._done.wait(0.1 if self._live else QUIET_LINE_EVERY_S):
            frame += 1
            if self._live:
                self._redraw(frame)
            else:
                print(f"{self.title}: {self.detail or 'working'} ({self._elapsed()})", flush=True)

    def _redraw(self, frame: int) -> None:
        bar = self.FRAMES[frame % len(self.FRAMES)]
        if self.fraction is not None:
            filled = int(20 * self.fraction)
            bar = f"[{'#' * filled}{'-' * (20 - filled)}] {self.fraction:4.0%}"
        head = f"{bar} {self.title} ({self._elapsed()}) "
        room = shutil.get_terminal_size().columns - 1 - len(head)
        detail = textwrap.shorten(self.detail, room, placeholder=" ...") if room >= LEAST_DETAIL_WIDTH else ""
        self._show(head + detail, "")

    def _show(self, line: str, end: str) -> None:
        # Blanks over the old line, where escape codes would need a terminal that knows them.
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:{width}}" if self._live else line, end=end, flush=True)


HARMLESS = re.compile(r"Location '.*' is ignored|Running pip as the 'root' user|A new release of pip")
RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
PLACES = re.compile(r" \(from [^)]*\)|(?<= )\S*/")
"""Where a step's package comes from: who wants it, and the folder or address before a file's name."""
STEP = re.compile(r"(?:Collecting|Downloading|Using cached|Processing|Installing|Building|Preparing|Getting) .*")


def shortened(step: str) -> str:
    """A step of pip's in few enough words; the list of all packages becomes their number."""
    if step.startswith("Installing collected packages"):
        return f"Installing packages: {step.count(',') + 1}"
    words = PLACES.sub("", step)
    return textwrap.shorten(words, DETAIL_WIDTH, placeholder=" ...")


def read_line(activity: Activity, line: str) -> str:
    """Show what one line of pip's output says; return what of it belongs into the log."""
    if progress := RAW_PROGRESS.match(line):
        done, total = int(progress[1]), int(progress[2])
        activity.fraction = done / total if total else None
        return ""
    if step := STEP.match(line.strip()):
        activity.detail, activity.fraction = shortened(step[0]), None
    return "" if HARMLESS.search(line) else line


def run_logged(activity: Activity, command: Sequence[str]) -> bool:
    """Run a command with its output in the log, telling its steps as they come; whether it went well."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stdout or ():
                log.write(read_line(activity, line))
        return process.returncode == 0


def pip_install(title: str, arguments: Sequence[str]) -> bool:
    """Run ``pip install`` in the environment behind a progress line; whether it went well."""
    options = ["--no-input", "--no-compile", *progress_option()]  # compile_modules takes more than one core
    command = [str(venv_python()), "-m", "pip", "install", *options, *arguments]
    with Activity(title) as activity:
        return run_logged(activity, command)


def compile_modules() -> None:
    """Compile all that is installed and our own, on several cores, or on one where that cannot be.

    Where Python is told to write no bytecode, every start would compile our own modules anew, as it does those that have
    changed since.  A module that cannot be compiled is left to whoever imports it: pip says no more of what is for
    another Python.
    """
    code = (
        "import compileall, sys, sysconfig\n"
        "for folder in (sysconfig.get_path('purelib'), sys.argv[1]):\n"
        "    compileall.compile_dir(folder, quiet=2, workers={})"
    )
    with Activity("Compiling Python's modules") as activity:
        for workers in sorted({1, min(MOST_COMPILERS, os.cpu_count() or 1)}, reverse=True):
            if run_logged(activity, [str(venv_python()), "-c", code.format(workers), str(ROOT / "helix_gateway")]):
                return
    print("They could not be compiled now, and are when they are first imported", flush=True)


def progress_option() -> list[str]:
    """Ask pip for progress that can be read, where it is new enough to give it."""
    return ["--progress-bar=raw"] if pip_version() >= PIP_WITH_READABLE_PROGRESS else []


def pip_version() -> tuple[int, int]:
    """The environment's pip; (0, 0) where it has none that runs."""
    said = re.match(r"pip (\d+)\.(\d+)", output_of([str(venv_python()), "-m", "pip", "--version"]))
    return (int(said[1]), int(said[2])) if said else (0, 0)


def pip_failure(what: str) -> SetupError:
    """The end of pip's log, and one line that says what failed."""
    lines = LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    print("\n".join(lines), file=sys.stderr)
    return SetupError(f"pip could not install {what}; the lines above are the end of {LOG}.")


def venv_python() -> Path:
    """The environment's interpreter."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv() -> None:
    """Make ``.venv``, or make it anew where what is there does not run.

    Raises:
        SetupError: this Python cannot make one.
    """
    if pip_version() > (0, 0):
        return
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "This Python cannot make a virtual environment with pip in it (no module ensurepip). "
            "On Debian and Ubuntu: sudo apt install python3-venv"
        )
    with Activity("Making .venv"):
        command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise SetupError(f"python -m venv {VENV} failed: {said[-1]}")


def torch_version() -> str | None:
    """Which torch the environment has, read from its metadata; None: none."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    return output_of([str(venv_python()), "-c", code]).strip() or None


def install_torch(plan: TorchPlan) -> str:
    """Install the planned torch, unless one is there that suits; return the requirement that now holds.

    Raises:
        SetupError: no index gave it.
    """
    there = torch_version()
    if installed_torch_suits(there, plan):
        print(f"torch {there} is there and stays", flush=True)
        return f"torch=={there}"
    title = f"Installing {plan.requirement} ({plan.reason})"
    if plan.first_index is not None:
        if not reachable(plan.first_index):
            print(f"{plan.first_index} does not answer; taking the ordinary index", flush=True)
        elif pip_install(title, ["--index-url", plan.first_index, "--timeout", "15", plan.requirement]):
            return plan.requirement
    if not pip_install(title, [plan.requirement]):
        raise pip_failure(plan.requirement)
    return plan.requirement


def setup_key() -> str:
    """Changes when what would be installed could change, or where the environment's paths would be wrong."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    digest.update(f"{ROOT} {sys.version} {platform.platform()} {shutil.which('nvidia-smi')}".encode())
    return digest.hexdigest()


def installed_extras(key: str) -> set[str] | None:
    """Extras that an earlier run of the same key installed; None: nothing that could be relied on."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
        return set(stamp["extras"]) if stamp["key"] == key and venv_python().exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def ensure(extras: Sequence[str] = ()) -> Path:
    """Make sure that ``.venv`` holds Helix with ``extras``; at once where an earlier run saw to it.

    Returns the environment's interpreter.

    Raises:
        SetupError: it cannot be done.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(f"Helix needs Python 3.10 or newer; this is {platform.python_version()}.")
    key = setup_key()
    there = installed_extras(key)
    if there is None or not there.issuperset(extras):
        install(key, sorted({*extras, *(there or ())}))
    return venv_python()


def install(key: str, extras: list[str]) -> None:
    """Build the environment, and stamp it once everything is in."""
    plan = torch_plan(inspect_machine())
    make_venv()
    STAMP.unlink(missing_ok=True)
    LOG.unlink(missing_ok=True)
    if pip_version() < PIP_WITH_READABLE_PROGRESS:
        pip_install("Updating pip", ["--upgrade", "pip"])  # an old one will do; it only tells less
    torch = install_torch(plan)
    names = sorted({*extras, plan.extra} - {None}, key=str)
    target = f".[{','.join(map(str, names))}]" if names else "."
    if not pip_install(f"Installing Helix and what it needs ({target})", [torch, "--editable", target]):
        raise pip_failure("Helix")
    compile_modules()
    STAMP.write_text(json.dumps({"key": key, "extras": extras, "torch": torch}), encoding="utf-8")


def run_script(main: Callable[[], int]) -> None:
    """Run a script's main function: a `SetupError` is one line and exit code 1, Ctrl-C is 130."""
    try:
        code = main()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        code = 130
    sys.exit(code)
