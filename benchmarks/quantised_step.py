"""What a whole step of SmolLM2-135M costs on this CPU with quantised weights, by how many rows it has.

Each decode row has its own sequence of ``--context`` tokens; the prefill is one prompt of ``--prefill`` tokens whose last
row's logits are wanted.  Formats are loaded side by side and take their steps in turn, so that whatever else the machine
does hits all alike; a figure is the median and the least of the steps.

Beside each decode stands its *bound*: the time in which this machine reads the weights once and the contexts' keys and
values once, at the speed at which it reads memory in the same run (the best of passes before each kind of step).

    OMP_PROC_BIND=true python benchmarks/quantised_step.py [--formats auto int8] [--steps 41] [--context 512]
"""

import argparse
import os
import statistics
import time
from pathlib import Path

from helix_gateway.runtime.cpu.threads import configure_threads, engine_environment

os.environ.update(engine_environment())

import numpy as np
from report import RESULTS, print_table, save
from rich.progress import Progress

from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.bandwidth import read_bandwidth_gb_per_s
from helix_gateway.runtime.factory import load_runner
from helix_gateway.runtime.model_source import resolve

ROWS = [1, 2, 4, 8, 16]
BLOCK = 16
FORMATS = {"auto": "the file's own", "int8": "int8", "int4": "int4", "none": "float32"}


def decode_batch(rows, context):
    """One row of each of some sequences, whose pages follow one another."""
    blocks = context // BLOCK + 1
    ones = np.arange(rows, dtype=np.int32)
    return StepBatch(
        token_ids=(ones * 7919 + 11) % 49152,
        positions=np.full(rows, context, np.int32),
        cu_seqlens=np.arange(rows + 1, dtype=np.int32),
        context_lens=np.full(rows, context + 1, np.int32),
        block_tables=(np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks),),
        logits_rows=ones,
    )


def prefill_batch(tokens):
    positions = np.arange(tokens, dtype=np.int32)
    return StepBatch(
        token_ids=(positions * 7919 + 11) % 49152,
        positions=positions,
        cu_seqlens=np.array([0, tokens], np.int32),
        context_lens=np.array([tokens], np.int32),
        block_tables=(np.arange(-(-tokens // BLOCK), dtype=np.int32)[None],),
        logits_rows=positions[-1:],
    )


class Variant:
    """The model in one format, with the steps that it takes."""

    def __init__(self, path, name, options):
        self._runner = load_runner(
            path,
            device="cpu",
            dtype="float32" if name == "none" else "auto",
            quantization=name,
            kv_cache_dtype=options.kv_cache_dtype,
            max_tokens_in_use=max(ROWS[-1] * (options.context + BLOCK), options.prefill + BLOCK),
        ).runner
        weights = {id(part.weight_tiles): part.weight_tiles.tiles for part in _packed(self._runner.parts)}
        self._weight_bytes = sum(tiles.nbytes for tiles in weights.values())

    def step(self, batch):
        self._runner.forward(batch)

    def bytes_of(self, rows, context):
        """What a decode cannot do without reading."""
        return self._weight_bytes + rows * context * self._runner.page_bytes // BLOCK


def _packed(parts):
    return [part for layer in parts.layers for together in layer.products for part in together] + [parts.head]


def measure(variants, batch, steps, advance):
    """Milliseconds of each variant's steps, one of each in turn after one that is not counted."""
    times = {name: [] for name in variants}
    for turn in range(steps + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant.step(batch)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
        advance()
    return times


def figure_of(variant, called, times, needed_bytes):
    return {
        "variant": variant,
        "step": called,
        "median_ms": statistics.median(times),
        "least_ms": min(times),
        "needed_bytes": needed_bytes,
    }


def beside_the_bound(figure, gb_per_s):
    """The figure with the time that reading takes, and how many times that it is; a prefill's bound is another."""
    if figure["needed_bytes"] is None:
        return figure | {"bound_ms": None, "times_the_bound": None}
    bound_ms = figure["needed_bytes"] / gb_per_s / 1e6
    return figure | {"bound_ms": bound_ms, "times_the_bound": figure["median_ms"] / bound_ms}


def draw(axes, figures, names, context):
    for name in names:
        mine = [figure for figure in figures if figure["variant"] == name and figure["bound_ms"] is not None]
        rows = [int(figure["step"].split()[0]) for figure in mine]
        (line,) = axes.plot(rows, [figure["median_ms"] for figure in mine], "o-", label=name)
        bounds = [figure["bound_ms"] for figure in mine]
        axes.plot(rows, bounds, ":", color=line.get_color(), label=f"{name}: memory's bound")
    axes.set(xlabel="rows in the step", ylabel="ms", title=f"A step of SmolLM2-135M, contexts of {context}")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(visible=True, alpha=0.3)


def figures_of(variants, options, bar):
    """All steps, and how fast memory was read meanwhile, in 10⁹ bytes a second."""
    few, speeds, figures = max(3, options.steps // 4), [], []
    task = bar.add_task("Steps", total=len(ROWS) * (options.steps + 1) + few + 1)
    for rows in ROWS:
        speeds.append(read_bandwidth_gb_per_s(configure_threads()))
        batch = decode_batch(rows, options.context)
        for name, times in measure(variants, batch, options.steps, lambda: bar.advance(task)).items():
            figures.append(figure_of(name, f"{rows} rows", times, variants[name].bytes_of(rows, options.context)))
    batch = prefill_batch(options.prefill)
    for name, times in measure(variants, batch, few, lambda: bar.advance(task)).items():
        figures.append(figure_of(name, f"prefill {options.prefill}", times, None))
    speed = max(speeds)
    return [beside_the_bound(figure, speed) for figure in figures], speed


def run(options):
    """Measure, print and save; returns the figures."""
    path = str(resolve(None))
    variants = {FORMATS[name]: Variant(path, name, options) for name in options.formats}
    with Progress() as bar:
        figures, speed = figures_of(variants, options, bar)
    columns = ["variant", "step", "median_ms", "least_ms", "bound_ms", "times_the_bound"]
    print_table(
        f"A step of SmolLM2-135M, contexts of {options.context}, {configure_threads()} threads, {speed:.1f} GB/s",
        [column.replace("_", " ") for column in columns],
        [["" if figure[column] is None else figure[column] for column in columns] for figure in figures],
    )
    results = {
        "threads": configure_threads(),
        "load_average": os.getloadavg()[0],
        "context": options.context,
        "kv_cache_dtype": options.kv_cache_dtype,
        "read_gb_per_s": speed,
        "figures": figures,
    }
    save(
        "quantised_step",
        results,
        lambda axes: draw(axes, figures, list(variants), options.context),
        folder=options.output,
    )
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["auto", "int8"])
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--context", type=int, default=512, help="tokens of each decode row")
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--kv-cache-dtype", default="int8")
    parser.add_argument("--output", type=Path, default=RESULTS)
    run(parser.parse_args())
