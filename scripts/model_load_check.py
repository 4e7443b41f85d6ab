"""Whether a model loads here: ``.venv/bin/python scripts/model_load_check.py [MODEL] [--dtype float32] [--prompt TEXT]``.

Loads it as ``helix serve`` would, and prints what it is, what loading took in time and memory, and one greedy answer.
Exits with 1 and one line where it does not load.
"""

import argparse
import os
import sys
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helix_gateway.core.errors import HelixError
from helix_gateway.runtime.cpu.threads import engine_environment
from helix_gateway.runtime.model_source import resolve
from helix_gateway.runtime.sources.model_facts import ModelFacts, read_facts

_POLL_S = 0.005


class PeakMemory:
    """``with PeakMemory() as peak: ... peak.bytes``: the most that this process held inside, above what it held before."""

    def __enter__(self) -> "PeakMemory":
        self._process = psutil.Process()
        self._before = self._most = self._process.memory_info().rss
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._over.wait(_POLL_S):
            self._most = max(self._most, self._process.memory_info().rss)

    @property
    def bytes(self) -> int:
        """Of resident memory."""
        return self._most - self._before


def describe(path: str, facts: ModelFacts) -> list[str]:
    """What the model is."""
    parameters = "a number of" if facts.parameters is None else f"{facts.parameters:,}"
    return [
        f"model      {path}",
        f"shape      {facts.architecture}, {parameters} parameters, context {facts.context_tokens}",
        f"weights    {facts.format}, {facts.weights}, {facts.size_bytes / 1e6:.0f} MB",
    ]


def try_model(options: argparse.Namespace) -> None:
    """Load and answer, telling each thing as it is known.

    Raises:
        HelixError: it does not load.
    """
    path = resolve(options.model)
    print("\n".join(describe(path, read_facts(Path(path)))), flush=True)
    from helix_gateway.service.helix_engine import HelixEngine

    start_s = time.perf_counter()
    with PeakMemory() as peak:
        engine = HelixEngine(path, dtype=options.dtype, device=options.device, kv_cache_memory_bytes=options.kv_bytes)
    with engine:
        print(f"loaded     in {time.perf_counter() - start_s:.1f} s, {peak.bytes / 1e6:.0f} MB at the most", flush=True)
        print(f"holds      {engine.max_model_len} tokens of prompt and answer together")
        start_s = time.perf_counter()
        result = engine.generate(options.prompt, max_tokens=options.max_tokens, temperature=0.0)
        seconds = time.perf_counter() - start_s
        print(f"answer     {result.text!r}")
        print(f"           {len(result.token_ids)} tokens in {seconds:.2f} s, ended by {result.finish_reason}")


def start_again_with_threads() -> None:
    """Give this process what an engine's is given: OpenMP reads its variables when it is loaded, so it needs them first."""
    missing = engine_environment()
    if os.name == "posix" and "OMP_NUM_THREADS" in missing:
        command = [sys.executable, *sys.argv]
        os.execve(sys.executable, command, {**os.environ, **missing})  # noqa: S606 - no shell is wanted


def main() -> int:
    """Try one model; 0 if it loads and answers."""
    parser = argparse.ArgumentParser(description="Load one model and let it answer once.")
    parser.add_argument("model", nargs="?", help="as for helix serve; left out, SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "directml", "mps", "xpu"])
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument(
        "--kv-bytes", type=int, default=2**28, help="memory of the KV cache, counted in what loading takes"
    )
    options = parser.parse_args()
    start_again_with_threads()
    try:
        try_model(options)
    except HelixError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
