"""Threads of compiled code in an engine's process: each on a core of its own, whatever else is loaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from helix_gateway.runtime.cpu.threads import engine_environment, usable_cores

CHILD = """
import ctypes, os, sys
from helix_gateway.runtime.cpu.threads import configure_threads, load_openmp
if sys.argv[2] == "first":
    load_openmp()
ctypes.CDLL(sys.argv[1])  # what a tokenizer's library brings along
import numba
configure_threads()

@numba.njit(parallel=True)
def total(count):
    result = 0.0
    for number in numba.prange(count):
        result += number
    return result

total(100)
for thread in os.listdir("/proc/self/task"):
    status = open(f"/proc/self/task/{thread}/status").read()
    print(status.partition("Cpus_allowed_list:")[2].split()[0])
"""


def cores_of_threads(tmp_path, when):
    copies = [
        Path(torch.__file__).parent / "lib",
        Path("/usr/lib/x86_64-linux-gnu"),
        Path("/usr/lib/aarch64-linux-gnu"),
    ]
    library = next(path for folder in copies for path in sorted(folder.glob("libgomp*.so*")))
    decoy = tmp_path / "libgomp-of-another.so"
    shutil.copy(library.resolve(), decoy)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(decoy), when],
        env={**os.environ, **engine_environment()},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return {cores for cores in done.stdout.split() if cores.isdecimal()}


def test_an_engine_uses_all_its_cores_though_another_library_brings_its_own_openmp(tmp_path):
    assert len(cores_of_threads(tmp_path, "first")) == usable_cores()


def test_the_other_library_would_have_taken_them(tmp_path):
    assert usable_cores() == 1 or len(cores_of_threads(tmp_path, "later")) < usable_cores()
