"""What a whole step of SmolLM2-135M costs on this CPU with quantised weights, by how many rows it has.

Each decode row has its own sequence of 512 tokens; the prefill is one of 256 tokens whose last row's logits are wanted.
Formats are loaded side by side and take their steps in turn, so that whatever else the machine does hits all alike;
a figure is the median and the least of the steps.  ``--reference FOLDER`` adds the steps of a `cpu_step.py` there (random
weights of the same shape, int8 keys and values), in the same turns.

    OMP_PROC_BIND=true python benchmarks/quantised_step.py [--formats auto int8] [--steps 41] [--reference FOLDER]
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

from helix_gateway.runtime.cpu.threads import configure_threads, engine_environment

os.environ.update(engine_environment())

import numpy as np
from report import RESULTS, print_table, save

from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.factory import load_runner
from helix_gateway.runtime.model_source import resolve

CONTEXT = 512
PREFILL = 256
ROWS = [1, 2, 4, 8, 16]
BLOCK = 16
FORMATS = {"auto": "the file's own", "int8": "int8", "int4": "int4", "none": "float32"}


def decode_batch(rows):
    """One row of each of some sequences, whose pages follow one another."""
    blocks = CONTEXT // BLOCK + 1
    ones = np.arange(rows, dtype=np.int32)
    return StepBatch(
        token_ids=(ones * 7919 + 11) % 49152,
        positions=np.full(rows, CONTEXT, np.int32),
        cu_seqlens=np.arange(rows + 1, dtype=np.int32),
        context_lens=np.full(rows, CONTEXT + 1, np.int32),
        block_tables=(np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks),),
        logits_rows=ones,
    )


def prefill_batch():
    positions = np.arange(PREFILL, dtype=np.int32)
    return StepBatch(
        token_ids=(positions * 7919 + 11) % 49152,
        positions=positions,
        cu_seqlens=np.array([0, PREFILL], np.int32),
        context_lens=np.array([PREFILL], np.int32),
        block_tables=(np.arange(PREFILL // BLOCK, dtype=np.int32)[None],),
        logits_rows=positions[-1:],
    )


def helix_steps(path, name):
    """Functions that take one step each, by what the step is called."""
    runner = load_runner(
        path,
        device="cpu",
        dtype="float32" if name == "none" else "auto",
        quantization=name,
        max_tokens_in_use=(ROWS[-1] + 1) * (CONTEXT + BLOCK),
    ).runner
    batches = {f"{rows} rows": decode_batch(rows) for rows in ROWS} | {f"prefill {PREFILL}": prefill_batch()}
    return {called: (lambda batch=batch: runner.forward(batch)) for called, batch in batches.items()}


def reference_steps(folder, kind):
    """The same for the reference's model of int8 or int4 weights."""
    sys.path.insert(0, str(folder))
    import cpu_step

    int8, int4 = cpu_step.drivers()
    model = cpu_step.Model(kind, cpu_step.make_step(int8 if kind == 8 else int4))
    pages = CONTEXT // BLOCK + 1

    def taking(rows, positions, table, first_wanted):
        tokens = np.arange(rows) * 7919 % 49152
        return lambda: model(tokens, positions, table, first_wanted)

    steps = {}
    for rows in ROWS:
        table = np.zeros((rows, pages + 2), np.int32)
        table[:, :pages] = np.arange(rows * pages).reshape(rows, pages)
        steps[f"{rows} rows"] = taking(rows, np.full(rows, CONTEXT), table, 0)
    table = np.tile(np.arange(pages + 2, dtype=np.int32), (PREFILL, 1))
    steps[f"prefill {PREFILL}"] = taking(PREFILL, np.arange(PREFILL), table, PREFILL - 1)
    return steps


def measure(variants, called, steps):
    """Milliseconds of each variant's steps, one of each in turn after one that is not counted."""
    times = {name: [] for name in variants}
    for turn in range(steps + 1):
        for name, by_call in variants.items():
            start = time.perf_counter()
            by_call[called]()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def draw(axes, figures, names):
    for name in names:
        mine = [figure for figure in figures if figure["variant"] == name and "rows" in figure["step"]]
        rows = [int(figure["step"].split()[0]) for figure in mine]
        axes.plot(rows, [figure["median_ms"] for figure in mine], "o-", label=name)
    axes.set(xlabel="rows in the step", ylabel="ms", title=f"A step of SmolLM2-135M, contexts of {CONTEXT}")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)


def run(formats=("auto", "int8"), steps=41, reference=None, folder=RESULTS):
    """Measure, print and save; returns the figures."""
    path = str(resolve(None))
    variants = {FORMATS[name]: helix_steps(path, name) for name in formats}
    if reference is not None:
        variants |= {f"reference, int{kind}": reference_steps(reference, kind) for kind in (4, 8)}
    figures = []
    for called in [f"{rows} rows" for rows in ROWS] + [f"prefill {PREFILL}"]:
        count = steps if "rows" in called else max(3, steps // 4)
        for name, times in measure(variants, called, count).items():
            figures.append(
                {"variant": name, "step": called, "median_ms": statistics.median(times), "least_ms": min(times)}
            )
    print_table(
        f"A step of SmolLM2-135M, contexts of {CONTEXT}, {configure_threads()} threads",
        ["variant", "step", "median ms", "least ms"],
        [list(figure.values()) for figure in figures],
    )
    results = {"threads": configure_threads(), "load_average": os.getloadavg()[0], "figures": figures}
    save("quantised_step", results, lambda axes: draw(axes, figures, list(variants)), folder=folder)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["auto", "int8"])
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    run(arguments.formats, arguments.steps, arguments.reference, arguments.output)
