"""What the linear layers of SmolLM2-135M cost on this CPU: the compiled product beside torch's ``F.linear``.

For each shape there are as many matrices as the model has layers of it, and a pass goes through all of them, so
weights come from memory as in a real step.  Both products get the same rows in the same run, in turn; a figure is the
median of passes.  A step of many rows computes its logits for few of them: the head gets at most 32.

    python benchmarks/cpu_linear.py [--rows 1 8 256] [--passes 7] [--output benchmarks/results]
"""

import argparse
import itertools
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from helix_gateway.runtime.cpu.threads import configure_threads, engine_environment

os.environ.update(engine_environment())

import torch
from report import RESULTS, print_table, save, tracked
from torch import nn

from helix_gateway.runtime.cpu.linear import PackedLinear

SHAPES = {(576, 576): 60, (576, 192): 60, (576, 1536): 60, (1536, 576): 30, (576, 49152): 1}
"""(in, out) features of SmolLM2-135M's linear layers, and how many of them it has."""
HEAD = (576, 49152)
HEAD_ROWS = 32
ROWS = [1, 2, 4, 8, 12, 16, 32, 64, 256]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Figure:
    """One pass over all matrices of a shape."""

    dtype: str
    inputs: int
    channels: int
    matrices: int
    step_rows: int
    helix_ms: float
    torch_ms: float

    @property
    def weight_bytes(self):
        return self.matrices * self.inputs * self.channels * DTYPES[self.dtype].itemsize

    @property
    def operations(self):
        rows = min(self.step_rows, HEAD_ROWS) if (self.inputs, self.channels) == HEAD else self.step_rows
        return 2 * rows * self.matrices * self.inputs * self.channels


def measure_shape(dtype_name, shape, rows_list, passes):
    """Figures of one shape for each number of rows."""
    inputs, channels = shape
    dtype = DTYPES[dtype_name]
    plain = [nn.Linear(inputs, channels, bias=False, dtype=dtype) for _ in range(SHAPES[shape])]
    packed = [PackedLinear.from_linear(layer) for layer in plain]
    for step_rows in rows_list:
        rows = min(step_rows, HEAD_ROWS) if shape == HEAD else step_rows
        x = torch.randn(rows, inputs).to(dtype)
        times = {"helix": [], "torch": []}
        for _ in range(3):
            for name, layers in (("helix", packed), ("torch", plain)):
                times[name] += timed_passes(layers, x, passes)
        medians = {f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        yield Figure(dtype_name, inputs, channels, len(plain), step_rows, **medians)


def timed_passes(layers, x, passes):
    """Seconds of some passes, after one that is not counted: the other product's threads may still spin in it."""
    seconds = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        for layer in layers:
            layer(x)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def step_rows_summary(figures, dtype_name, rows):
    """All products of one step: milliseconds of both, and the compiled ones' GB/s of weights and GFLOP/s."""
    mine = [figure for figure in figures if (figure.dtype, figure.step_rows) == (dtype_name, rows)]
    helix_ms, torch_ms = sum(figure.helix_ms for figure in mine), sum(figure.torch_ms for figure in mine)
    return {
        "dtype": dtype_name,
        "rows": rows,
        "helix_ms": helix_ms,
        "torch_ms": torch_ms,
        "speedup": torch_ms / helix_ms,
        "gigabytes_per_s": sum(figure.weight_bytes for figure in mine) / helix_ms / 1e6,
        "gigaflops": sum(figure.operations for figure in mine) / helix_ms / 1e6,
    }


def draw(axes, summaries):
    for (dtype_name, product), style in zip(
        [(dtype_name, product) for dtype_name in DTYPES for product in ("helix", "torch")],
        ("C0-o", "C0--", "C1-o", "C1--"),
    ):
        mine = [summary for summary in summaries if summary["dtype"] == dtype_name]
        milliseconds = [summary[f"{product}_ms"] for summary in mine]
        axes.loglog([summary["rows"] for summary in mine], milliseconds, style, label=f"{product}, {dtype_name}")
    axes.set(xlabel="rows in the step", ylabel="ms", title="All linear layers of SmolLM2-135M, one step")
    axes.legend()
    axes.grid(visible=True, which="both", alpha=0.3)


@torch.inference_mode()
def run(rows_list=ROWS, passes=3, folder=RESULTS):
    """Measure, print and save; returns the summaries."""
    threads = configure_threads()
    torch.set_num_threads(threads)
    figures = [
        figure
        for dtype_name, shape in tracked(itertools.product(DTYPES, SHAPES), "Shapes")
        for figure in measure_shape(dtype_name, shape, rows_list, passes)
    ]
    summaries = [step_rows_summary(figures, dtype_name, rows) for dtype_name in DTYPES for rows in rows_list]
    print_table(
        f"Linear layers of SmolLM2-135M, {threads} threads",
        ["dtype", "rows", "Helix ms", "torch ms", "ratio", "GB/s", "GFLOP/s"],
        [list(summary.values()) for summary in summaries],
    )
    results = {"threads": threads, "steps": summaries, "shapes": [asdict(figure) for figure in figures]}
    save("cpu_linear", results, lambda axes: draw(axes, summaries), folder=folder)
    return summaries


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    run(arguments.rows, arguments.passes, arguments.output)
