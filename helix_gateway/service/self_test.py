"""A short trial of an engine: ``python -m helix_gateway.service.self_test``, a finding a line, as JSON.

Run in a process of its own, started with `engine_environment`, as an engine's is: so it computes as an engine would,
and where a kernel brings the process down, whoever started it lives to tell.  Tries the default model where it is on
this machine, otherwise a tiny made-up one.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from helix_gateway.core.errors import HelixError
from helix_gateway.service.findings import Finding

if TYPE_CHECKING:
    from helix_gateway.service.helix_engine import GenerationResult, HelixEngine

_NEW_TOKENS = 32
_KV_CACHE_BYTES = 64 * 2**20
_SLOW_COMPILE_S = 20.0
_POOR_SHARE = 0.3
"""Of the tokens that memory alone would allow, below which something else is in the way."""
_COMPILE_CACHE_VARIABLE, _TEMPORARY_PREFIX = "NUMBA_CACHE_DIR", "helix-compiled-"
"""As `runtime.cpu.compile_cache` has them."""
_REPORT = "Please report this with what helix doctor --json tells; --dtype float32 --device cpu may help meanwhile."


@dataclass(frozen=True, slots=True)
class _Trial:
    """A model with a question whose answer is known."""

    name: str
    path: str
    prompt: str
    answer: tuple[int, ...]
    """Its first greedy tokens in float32, those of transformers' ``generate``; each by a margin that quantising leaves."""


SMOLLM2_PROMPT = "1, 2, 3, 4, 5, 6,"
SMOLLM2_ANSWER = (216, 39, 28, 216, 40, 28, 216, 41, 28, 216, 33, 32, 28, 216, 33, 33)
TINY_PROMPT = "send"
TINY_ANSWER = (220, 119, 121, 91, 49, 145, 238, 119, 3, 10, 118, 106, 21, 73, 105, 48)


def findings() -> Iterator[Finding]:
    """Try everything in turn; each finding is there as soon as it is known.

    Raises:
        HelixError: the engine cannot be started, or failed.
    """
    yield _device()
    cores = _cores()
    bandwidth = _bandwidth_gb_per_s(cores)
    yield _memory(bandwidth, cores)
    with tempfile.TemporaryDirectory() as folder:
        yield from _try_engine(_trial(Path(folder)), bandwidth)


def _device() -> Finding:
    import torch

    from helix_gateway.runtime.cpu.arm import is_arm
    from helix_gateway.runtime.device import get_device
    from helix_gateway.runtime.hardware import inspect_hardware

    device, hardware = get_device(), inspect_hardware()
    if device.type != "cpu":
        return Finding("device", "ok", f"{device.type}, by torch {torch.__version__} and its kernels")
    said = (
        f"cpu, by kernels that Helix compiles for it ({_widest(hardware.instruction_sets)}, for bytes {_byte_products()}); "
        f"torch {torch.__version__}"
    )
    if is_arm():
        said += "; on Arm their results were checked under an emulator, and their speed was never measured"
    if hardware.gpus and (torch.version.cuda or torch.version.hip):
        advice = (
            f"This torch could use the {hardware.gpus[0].name} but does not find it: see that its driver is new enough."
        )
        return Finding("device", "warning", said, advice)
    return Finding("device", "ok", said)


def _widest(instruction_sets: Sequence[str]) -> str:
    names = {"avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "neon": "NEON"}
    return next((told for name, told in names.items() if name in instruction_sets), "no vectors told")


def _byte_products() -> str:
    """Which instructions multiply quantised weights, keys and values."""
    from helix_gateway.runtime.cpu.integer_dot import host_dot

    return host_dot()


def _computes_here() -> bool:
    """Whether models run on the processor, through compiled kernels."""
    from helix_gateway.runtime.device import get_device

    return get_device().type == "cpu"


def _cores() -> int:
    from helix_gateway.runtime.cpu.threads import wanted_threads

    return wanted_threads()


def _bandwidth_gb_per_s(threads: int) -> float:
    from helix_gateway.runtime.bandwidth import read_bandwidth_gb_per_s

    return read_bandwidth_gb_per_s(threads)


def _memory(bandwidth_gb_per_s: float, threads: int) -> Finding:
    """How fast memory is, and what that allows at most where each token needs the default model's weights read once."""
    from helix_gateway.runtime.sources.default_model import DEFAULT_MODEL, DEFAULT_MODEL_BYTES

    said = f"{bandwidth_gb_per_s:.1f} GB/s read by {threads} threads"
    if _computes_here():
        bound = _most_tokens_per_s(bandwidth_gb_per_s, DEFAULT_MODEL_BYTES)
        said += f", so one stream of {DEFAULT_MODEL} can make {bound:.0f} tokens/s at most without speculation"
    return Finding("memory bandwidth", "ok", said)


def _most_tokens_per_s(bandwidth_gb_per_s: float, weight_bytes: int) -> float:
    return bandwidth_gb_per_s * 1e9 / weight_bytes


def _trial(folder: Path) -> _Trial:
    from helix_gateway.runtime.sources.default_model import DEFAULT_MODEL, default_model_path
    from helix_gateway.service.tiny_model import write_tiny_model

    path = default_model_path()
    if path.is_file():
        return _Trial(DEFAULT_MODEL, str(path), SMOLLM2_PROMPT, SMOLLM2_ANSWER)
    return _Trial("a tiny made-up model", str(write_tiny_model(folder)), TINY_PROMPT, TINY_ANSWER)


def _try_engine(trial: _Trial, bandwidth_gb_per_s: float) -> Iterator[Finding]:
    from helix_gateway.service.helix_engine import HelixEngine

    start_s = time.perf_counter()
    with HelixEngine(trial.path, kv_cache_memory_bytes=_KV_CACHE_BYTES) as engine:
        first = _ask(engine, trial, len(trial.answer))
        yield _start(trial, time.perf_counter() - start_s)
        if _computes_here():
            yield from _compiled_kernels()
        yield _answer(trial, first)
        yield _speed(trial, _ask(engine, trial, _NEW_TOKENS), bandwidth_gb_per_s)


def _ask(engine: "HelixEngine", trial: _Trial, new_tokens: int) -> "GenerationResult":
    return engine.generate(trial.prompt, max_tokens=new_tokens, temperature=0.0, ignore_eos=True)


def _start(trial: _Trial, seconds: float) -> Finding:
    said = f"{trial.name} was loaded and answered within {seconds:.1f} s"
    if seconds < _SLOW_COMPILE_S:
        return Finding("start", "ok", said)
    return Finding(
        "start",
        "warning",
        f"{said}: kernels were compiled, or the machine is busy",
        "Run it once more: what was compiled is kept. If it stays slow, see that the cache folder can be written.",
    )


def _compiled_kernels() -> Iterator[Finding]:
    """Which kernels compute, where they are kept, and how their threads are started; the engine has just made all known."""
    import numba

    yield _kernels()
    folder = Path(os.environ.get(_COMPILE_CACHE_VARIABLE, ""))
    size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    said = f"{folder}, {size_bytes / 1e6:.1f} MB"
    if folder.parent.name.startswith(_TEMPORARY_PREFIX):
        advice = "The user's cache folder cannot be written, so every start compiles anew: mend that, or set NUMBA_CACHE_DIR."
        yield Finding("compiled kernels", "warning", said, advice)
    else:
        yield Finding("compiled kernels", "ok", said)
    layer = numba.threading_layer()
    said = f"{_cores()}, started by {layer}"
    if layer == "workqueue":
        advice = "Steps are up to 0.1 ms slower than with OpenMP: install libgomp (package libgomp1), or a torch that brings it."
        yield Finding("threads", "warning", said, advice)
    else:
        yield Finding("threads", "ok", said)


def _kernels() -> Finding:
    """Which instructions multiply bytes, and how many rows share one reading of what they are multiplied with."""
    from helix_gateway.runtime.cpu.attention_int8_items import MANY_ROWS
    from helix_gateway.runtime.cpu.quantised_products import FEW_ROWS

    rows = f"products read their weights once for up to {FEW_ROWS} rows, attention its keys for up to {MANY_ROWS}"
    said = f"{_byte_products()}: {rows}"
    return Finding("kernels", "ok", said)


def _answer(trial: _Trial, result: "GenerationResult") -> Finding:
    if tuple(result.token_ids) == trial.answer:
        return Finding("answer", "ok", f"{trial.name} gives the tokens that it must")
    return Finding("answer", "problem", f"{trial.name} gives other tokens than it must: {result.token_ids}", _REPORT)


def _speed(trial: _Trial, result: "GenerationResult", bandwidth_gb_per_s: float) -> Finding:
    times_s = result.metrics.token_times_s
    tokens_per_s = (len(times_s) - 1) / max(times_s[-1] - times_s[0], 1e-9)
    bound = _memory_bound(trial, bandwidth_gb_per_s)
    said = f"{tokens_per_s:.0f} tokens/s, one stream of {trial.name} as it is served where nothing else is asked for"
    if bound is None:
        return Finding("speed", "ok", said)
    said += f", of {bound:.0f} that memory would allow without speculation"
    if tokens_per_s > bound:
        said += ": drafts came on top, or something else read memory while it was measured"
    if tokens_per_s >= _POOR_SHARE * bound:
        return Finding("speed", "ok", said)
    advice = "See what else uses the processor (load in the first lines); on a quiet machine it should be near that."
    return Finding("speed", "warning", said, advice)


def _memory_bound(trial: _Trial, bandwidth_gb_per_s: float) -> float | None:
    """Tokens a second at which a file's own weights can be read, on a CPU; None for a model that caches hold."""
    path = Path(trial.path)
    if not _computes_here() or path.is_dir():
        return None
    return _most_tokens_per_s(bandwidth_gb_per_s, path.stat().st_size)


def main() -> None:
    """Print each finding; what comes to an end before its time is one more."""
    try:
        for finding in findings():
            _print(finding)
    except HelixError as error:
        _print(Finding("engine", "problem", str(error), "Mend that first; helix serve would say the same."))
    except ImportError as error:
        advice = "Install Helix again, with all that it needs: pip install --upgrade helix-gateway."
        _print(Finding("engine", "problem", f"A library is missing: {error}", advice))


def _print(finding: Finding) -> None:
    sys.stdout.write(msgspec.json.encode(finding).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
