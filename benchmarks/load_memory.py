"""How long a model takes to load, and how much memory at most, beside its weights' own size.

Each model and dtype is loaded in a process of its own.  The peak is that of the resident set, sampled every 2 ms,
less the resident set once everything is imported.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

SAMPLE_S = 0.002


class PeakMemory:
    """The largest resident set of this process while the block runs, in bytes."""

    def __enter__(self):
        import psutil

        self._process = psutil.Process()
        self._done = threading.Event()
        self.start_bytes = self.peak_bytes = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self):
        while not self._done.wait(SAMPLE_S):
            self._sample()

    def _sample(self):
        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)


def measure(model, dtype):
    """Load one model in this process."""
    import torch

    from helix_gateway.runtime.loading import load_model, model_config, resolve_dtype

    wanted = resolve_dtype(model, dtype)
    import transformers

    # The model's own module and what it imports; the weights are what is measured.
    transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config(model))]
    start = time.perf_counter()
    with PeakMemory() as memory:
        loaded = load_model(model, device=torch.device("cpu"), dtype=wanted)
    seconds = time.perf_counter() - start
    weights_bytes = sum(parameter.nbytes for parameter in loaded.parameters())
    peak_bytes = memory.peak_bytes - memory.start_bytes
    return {
        "model": model,
        "dtype": str(wanted).removeprefix("torch."),
        "load_s": seconds,
        "weights_bytes": weights_bytes,
        "peak_bytes": peak_bytes,
        "peak_ratio": peak_bytes / weights_bytes,
    }


def measure_runner(model, dtype):
    """Load, pack and make ready to serve in this process; a KV cache of 16 MB, whose pages count too."""
    import torch
    import transformers

    from helix_gateway.runtime.factory import load_runner
    from helix_gateway.runtime.loading import model_config

    transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config(model))]
    start = time.perf_counter()
    with PeakMemory() as memory:
        runner = load_runner(
            model, device="cpu", dtype=dtype, kv_cache_memory_bytes=1 << 24, max_tokens_in_use=1000
        ).runner
    return {
        "load_s": time.perf_counter() - start,
        "vocab_size": runner.vocab_size,
        "threads": torch.get_num_threads(),
        "peak_bytes": memory.peak_bytes - memory.start_bytes,
    }


def measure_apart(model, dtype):
    command = [sys.executable, __file__, "--measure", model, dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def median_of(runs):
    return sorted(runs, key=lambda run: run["load_s"])[len(runs) // 2]


def print_table(results):
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "dtype", "load s", "weights MB", "peak MB", "peak / weights")
    for result in results:
        table.add_row(
            Path(result["model"]).name,
            result["dtype"],
            f"{result['load_s']:.2f}",
            f"{result['weights_bytes'] / 1e6:.0f}",
            f"{result['peak_bytes'] / 1e6:.0f}",
            f"{result['peak_ratio']:.3f}",
        )
    Console().print(table)


def plot(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.bar(
        [f"{Path(result['model']).name}\n{result['dtype']}" for result in results], [r["peak_ratio"] for r in results]
    )
    axes.axhline(1.3, linestyle="--", color="grey", label="bound")
    axes.set_ylabel("peak memory / weights")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="what `helix serve` takes; the default model where none is named")
    parser.add_argument("--dtype", action="append", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--measure-runner", nargs=2, metavar=("PATH", "DTYPE"), help="the same for a whole runner")
    parser.add_argument("--measure", nargs=2, metavar=("PATH", "DTYPE"), help="load once in this process, print JSON")
    options = parser.parse_args()
    if options.measure_runner:
        print(json.dumps(measure_runner(*options.measure_runner)))
        return
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    from helix_gateway.runtime.model_source import resolve

    paths = [resolve(model) for model in options.models or [None]]
    dtypes = options.dtype or ["float32", "bfloat16"]
    results = [
        median_of([measure_apart(path, dtype) for _ in range(options.repeats)]) for path in paths for dtype in dtypes
    ]
    print_table(results)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "load_memory.json").write_text(json.dumps(results, indent=2))
    plot(results, options.out / "load_memory.png")


if __name__ == "__main__":
    main()
