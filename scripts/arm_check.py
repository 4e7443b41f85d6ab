"""Whether Helix computes on Arm what it computes here: its tests, and steps of models, under an emulator.

``.venv/bin/python scripts/arm_check.py [--processor NAME …] [--steps-only] [PYTEST ARGUMENTS]``, on Debian, on x86-64.

An Arm Python is put together in a folder, from Debian's packages and PyPI's wheels (half a gigabyte, fetched once), and
run by qemu's emulation of single programs, on processors with and without the instructions that kernels are written for.
The same steps of the same models are computed here and there, and must give the same bits; then tests run as they are.
Says nothing about speed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helix_gateway.core.errors import HelixError
from helix_gateway.runtime.cache_folder import cache_folder
from helix_gateway.runtime.model_source import resolve

ROOT = Path(__file__).resolve().parent.parent
PROCESSORS = {"cortex-a57": "portable", "cortex-a76": "dotprod", "max": "i8mm"}
"""qemu's names, and the dot products that must be chosen on each."""
TESTS = [
    *(
        f"compat_tests/runtime/{name}.py"
        for name in (
            "test_arm",
            "test_integer_dot",
            "test_quantised_products",
            "test_wide_products",
            "test_cpu_attention",
        )
    ),
    # Compiling takes its time there; lesser processors are emulated themselves.
    *("-o", "timeout=1500", "-k", "not lesser_processor and not older_instructions"),
]
STEPS = "compat_tests.runtime.step_bits"

_QEMU = "qemu-user-static"
_DEBIAN_PACKAGES = ["python3", "libstdc++6", "libgomp1"]
# Later ones for Arm come with CUDA, four times as large, and cannot be imported without it.
_TORCH = "torch==2.8.0"
_WHEELS = [
    "numpy", "numba", "llvmlite", "transformers", "tokenizers", "safetensors", "huggingface-hub", "gguf", "structlog",
    "filelock", "platformdirs", "psutil", "msgspec", "jinja2", "typing-extensions", "scipy", "hypothesis", "pytest",
    "pytest-timeout", "pytest-asyncio",
]  # fmt: skip
"""In the versions that are installed here."""
_OF_TORCH = ["sympy", "networkx", "fsspec"]
_PLATFORMS = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in (17, 24, 26, 27, 28, 31, 34))]
# Linux' names of the bits of the two words in which it tells programs what a processor has (asm/hwcap.h).
_CAPABILITIES = {
    0: "fp", 1: "asimd", 3: "aes", 4: "pmull", 5: "sha1", 6: "sha2", 7: "crc32", 8: "atomics", 9: "fphp", 10: "asimdhp",
    20: "asimddp", 22: "sve",
}  # fmt: skip
_CAPABILITIES_2 = {1: "sve2", 13: "i8mm", 14: "bf16"}
# Of getauxval: AT_HWCAP and AT_HWCAP2.
_ASK = "import ctypes; ask = ctypes.CDLL(None).getauxval; ask.restype = ctypes.c_ulong; print(ask(16), ask(26))"
_PYTEST = "import sys, pytest; sys.executable = sys.argv.pop(1); sys.exit(pytest.main(sys.argv[1:]))"
_CHOSEN = "from helix_gateway.runtime.cpu.integer_dot import usable_dots; print(*usable_dots())"


class CheckError(Exception):
    """The check cannot go on; the message is one line for a person."""


def command(*words: str | Path, folder: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Run something to its end, and return what it printed.

    Raises:
        CheckError: it failed.
    """
    told = [str(word) for word in words]
    done = subprocess.run(
        told, cwd=folder, env=os.environ | (environment or {}), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CheckError(f"{' '.join(told)[:200]}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def capabilities(first: int, second: int) -> list[str]:
    """What the two words of a processor's capabilities say, as ``/proc/cpuinfo`` names it."""
    words = ((first, _CAPABILITIES), (second, _CAPABILITIES_2))
    return [name for word, names in words for bit, name in names.items() if word >> bit & 1]


@dataclass(frozen=True)
class Kit:
    """What is needed to run Arm programs, in one folder."""

    folder: Path

    @property
    def root(self) -> Path:
        """Debian for Arm."""
        return self.folder / "root"

    @property
    def site(self) -> Path:
        """Python's packages for Arm."""
        return self.folder / "site"

    @property
    def qemu(self) -> Path:
        """The emulator, static, so that it needs nothing of the Arm system."""
        return self.folder / "qemu/usr/bin/qemu-aarch64-static"

    @property
    def python(self) -> Path:
        """Debian's Python."""
        return self.root / "usr/bin" / (self.root / "usr/bin/python3").readlink()

    def fetch(self) -> None:
        """Fetch whatever is not there yet; what was fetched in part only is fetched anew."""
        parts = (("qemu", self._fetch_qemu), ("root", self._fetch_root), ("site", self._fetch_site))
        for name, fetch in parts:
            stamp = self.folder / f"{name}.done"
            if not stamp.exists():
                print(f"fetching {name} into {self.folder}", flush=True)
                shutil.rmtree(self.folder / name, ignore_errors=True)
                (self.folder / name).mkdir(parents=True)
                fetch()
                stamp.touch()

    def _fetch_qemu(self) -> None:
        command("apt-get", "download", _QEMU, folder=self.folder)
        (package,) = self.folder.glob(f"{_QEMU}_*.deb")
        command("dpkg", "-x", package, self.folder / "qemu")
        package.unlink()

    def _fetch_root(self) -> None:
        state = self.folder / "apt"
        for place in ("lists/partial", "cache/archives/partial"):
            (state / place).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        (state / "apt.conf").write_text(
            'APT::Architecture "arm64"; APT::Architectures { "arm64"; }; APT::Sandbox::User "root"; '
            f'Debug::NoLocking "1"; Dir::State "{state}"; Dir::State::status "{state}/status"; '
            f'Dir::State::Lists "{state}/lists"; Dir::Cache "{state}/cache";\n'
        )
        apart = {"APT_CONFIG": str(state / "apt.conf")}
        command("apt-get", "update", environment=apart)
        chosen = ["--download-only", "--yes", "--no-install-recommends", *_DEBIAN_PACKAGES]
        command("apt-get", "install", *chosen, environment=apart)
        for package in (state / "cache/archives").glob("*.deb"):
            command("dpkg", "-x", package, self.root)
        shutil.rmtree(state)

    def _fetch_site(self) -> None:
        number = self.python.name.removeprefix("python")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(self.site), "--upgrade"]
        pip += ["--only-binary=:all:", "--python-version", number]
        pip += [word for platform in _PLATFORMS for word in ("--platform", platform)]
        # Alone, since pip judges its needs by the processor on which pip runs.
        command(*pip, "--no-deps", _TORCH)
        command(*pip, *(f"{name}=={version(name)}" for name in _WHEELS), *_OF_TORCH)


@dataclass(frozen=True)
class Processor:
    """One emulated processor, with a system that tells what it has."""

    kit: Kit
    name: str

    @property
    def folder(self) -> Path:
        """Where its system and its compiled code lie."""
        return self.kit.folder / "processors" / self.name

    @property
    def _launcher(self) -> Path:
        return self.folder / "python"

    def prepare(self) -> None:
        """Make its system: the common one, and a ``/proc/cpuinfo`` of what the processor says of itself."""
        system = self.folder / "system"
        (system / "proc").mkdir(parents=True, exist_ok=True)
        for part in self.kit.root.iterdir():
            link = system / part.name
            if not link.is_symlink():
                link.symlink_to(part)
        emulated = f"exec {self.kit.qemu} -L {system} -cpu {self.name} {self.kit.python}"
        self._launcher.write_text(f'#!/bin/sh\n{emulated} "$@"\n')
        self._launcher.chmod(0o755)
        told = capabilities(*(int(word) for word in self.run("-c", _ASK).split()))
        (system / "proc/cpuinfo").write_text(f"processor\t: 0\nFeatures\t: {' '.join(told)}\n\n")

    @property
    def environment(self) -> dict[str, str]:
        """What its Python is started with."""
        return {
            "PYTHONPATH": f"{ROOT}:{self.kit.site}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HELIX_CACHE": str(self.folder / "cache"),
        }

    def run(self, *arguments: str) -> str:
        """What its Python prints."""
        return command(self._launcher, *arguments, folder=ROOT, environment=self.environment)

    def passes(self, arguments: Sequence[str]) -> bool:
        """Run tests, their output where this one's goes.  What they start by ``sys.executable`` is emulated too."""
        words = [str(self._launcher), "-c", _PYTEST, str(self._launcher), "-q", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(words, cwd=ROOT, env=os.environ | self.environment, check=False).returncode == 0


def steps_equal(processor: Processor, models: Sequence[str]) -> bool:
    """Whether steps give the same tokens and logits, bit for bit, here and there; prints what is not so."""
    printed = command(sys.executable, "-m", STEPS, *models, folder=ROOT, environment={"PYTHONPATH": str(ROOT)})
    here, there = (json.loads(text.splitlines()[-1]) for text in (printed, processor.run("-m", STEPS, *models)))
    for name, mine in here.items():
        print(
            f"  {name}: {'the same bits' if mine == there[name] else f'{mine} here, {there[name]} there'}", flush=True
        )
    return bool(here == there)


def check(processor: Processor, tests: Sequence[str], models: Sequence[str]) -> bool:
    """Everything, on one processor."""
    processor.prepare()
    chosen = processor.run("-c", _CHOSEN).split()
    print(f"{processor.name}: dot products {', '.join(chosen)}", flush=True)
    is_right = chosen[0] == PROCESSORS.get(processor.name, chosen[0])
    steps = steps_equal(processor, models)
    return is_right and steps and (not tests or processor.passes(tests))


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processor", action="append", help="one of qemu's; may be given several times")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "arm", help="where to put what is fetched")
    parser.add_argument("--steps-only", action="store_true", help="run no tests")
    arguments, chosen = parser.parse_known_args()
    tests = [] if arguments.steps_only else chosen or TESTS
    try:
        kit = Kit(arguments.folder.resolve())
        kit.fetch()
        models = [resolve(None)]
        names = arguments.processor or list(PROCESSORS)
        wrong = [name for name in names if not check(Processor(kit, name), tests, models)]
    except (CheckError, HelixError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrong on {', '.join(wrong)}" if wrong else "Arm computes what this machine computes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
