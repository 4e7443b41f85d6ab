"""What attention of a step of SmolLM2-135M costs: 30 layers, 9 heads over 3 KV heads of 64 dimensions, for each KV dtype.

Time is that of one thread's processor (`time.thread_time`), so that who else runs counts less; the dtypes take turns,
so that the rest of it hurts all alike.  `--prototype` names a folder with a `cpu_step.py` whose kernel `attend` takes
its turn too, on queries that are quantised already; it does nothing else, in particular not write keys and values.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
import report
import torch

from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.cpu.attention import CpuPagedAttention
from helix_gateway.runtime.groups import LayerShape, group_layers
from helix_gateway.runtime.pages import Arena, lay_out_pages

LAYERS, HEADS, KV_HEADS, DIM, BLOCK, PAGES = 30, 9, 3, 64, 16, 640
CASES = {
    "1 row, 512": [(511, 1)],
    "4 rows": [(511, 1)] * 4,
    "8 rows": [(511, 1)] * 8,
    "16 rows": [(511, 1)] * 16,
    "window of 8": [(504, 8)],
    "256 tokens at 0": [(0, 256)],
    "256 at 2,048": [(2048, 256)],
}
"""For each sequence its first position and its rows."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def tables_of(spans, scattered):
    """Block tables of fresh pages, one after another or anywhere."""
    counts = [-(-(first + rows) // BLOCK) for first, rows in spans]
    pages = np.random.default_rng(0).permutation(PAGES) if scattered else np.arange(PAGES)
    tables = np.zeros((len(spans), max(counts)), np.int32)
    for table, count, end in zip(tables, counts, np.cumsum(counts)):
        table[:count] = pages[end - count : end]
    return tables


def step_of(spans, tables):
    positions = np.concatenate([np.arange(first, first + rows, dtype=np.int32) for first, rows in spans])
    lengths = [rows for _, rows in spans]
    ends = np.array([first + rows for first, rows in spans], np.int32)
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    return StepBatch(positions, positions, bounds, ends, (tables,), positions[:0])


class Helix:
    """The compiled attention over pages of one dtype."""

    def __init__(self, dtype):
        groups = group_layers("m", [LayerShape(KV_HEADS, DIM, DIM, None)] * LAYERS)
        layout = lay_out_pages(groups, BLOCK, dtype)
        arena = Arena.slice_major(layout, PAGES, torch.device("cpu"))
        if dtype == torch.int8:
            arena.memory.view(torch.float32).uniform_(0.007, 0.012)
        else:
            arena.memory.uniform_(-1, 1)
        self._attention = CpuPagedAttention(arena, layout.groups, [HEADS] * LAYERS)

    def case(self, spans, tables):
        batch = step_of(spans, tables)
        rows = len(batch.positions)
        query, key, value = (torch.randn(1, heads, rows, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

        def run():
            self._attention.begin(batch)
            for layer in range(LAYERS):
                self._attention.attend(layer, query, key, value, DIM**-0.5, None)

        return run


class Prototype:
    """The kernel of a `cpu_step.py`."""

    def __init__(self, folder):
        sys.path.insert(0, str(folder))
        import cpu_step
        from numba import njit

        attend, bytes_ = cpu_step.attend, cpu_step.KVB
        group, stride = HEADS // KV_HEADS, KV_HEADS * cpu_step.KVB
        memory = cpu_step.arena(LAYERS * PAGES * stride)
        memory[: LAYERS * PAGES * stride].view(np.float32)[:] = 0.01
        self._memory, self._scores = memory, cpu_step.arena(1 << 22)  # it wants them aligned

        @njit(nogil=True)
        def run(q, scales, starts, tables, sequence, positions, base, scores, parts, stats):
            step, items = tables.shape[1] * 4, len(positions) * KV_HEADS
            for layer in range(LAYERS):
                for item in range(items):
                    row, head = item // KV_HEADS, item % KV_HEADS
                    following = min(item + 1, items - 1)
                    g = row * HEADS + head * group
                    here = base + layer * stride * PAGES
                    attend(
                        q + g * 64,
                        scales + g * 4,
                        starts + g * 4,
                        tables.ctypes.data + sequence[row] * step,
                        0,
                        positions[row] // BLOCK + 1,
                        here + head * bytes_,
                        stride,
                        positions[row],
                        scores,
                        parts + g * 256,
                        stats + g * 8,
                        1,
                        tables.ctypes.data + sequence[following // KV_HEADS] * step,
                        here + following % KV_HEADS * bytes_,
                    )

        self._run = run

    def case(self, spans, tables):
        batch = step_of(spans, tables)
        rows = len(batch.positions)
        sequence = np.repeat(np.arange(len(spans)), [count for _, count in spans])
        q = np.random.default_rng(1).integers(-127, 128, rows * HEADS * DIM).astype(np.int8)
        sums = -128 * q.reshape(-1, DIM).astype(np.int32).sum(1).astype(np.int32)
        scales, parts = np.full(rows * HEADS, 0.001, np.float32), np.zeros(rows * HEADS * DIM, np.float32)
        stats, scores = np.zeros(rows * HEADS * 2, np.float32), self._scores
        positions = batch.positions.astype(np.int64)

        def run():
            at = [array.ctypes.data for array in (q, scales, sums)]
            base = self._memory.ctypes.data
            others = [array.ctypes.data for array in (scores, parts, stats)]
            self._run(*at, tables, sequence, positions, base, *others)

        return run


def take_turns(runs, repeats):
    """Milliseconds of the processor, for each run the median and the least of some repeats, interleaved."""
    times = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if turn:
                times[name].append(1000 * (time.thread_time() - start))
    return {name: {"median_ms": statistics.median(taken), "least_ms": min(taken)} for name, taken in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prototype", type=Path)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--scattered", action="store_true", help="pages lie anywhere, not one after another")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    sides = {name: Helix(DTYPES[name]) for name in options.dtypes}
    if options.prototype is not None:
        sides["prototype"] = Prototype(options.prototype)
    results = {}
    for case, spans in report.tracked(CASES.items(), "Cases"):
        tables = tables_of(spans, options.scattered)
        runs = {name: side.case(spans, tables) for name, side in sides.items()}
        results[case] = take_turns(runs, options.repeats if len(spans) * spans[0][1] < 100 else 8)
    rows = [
        [case, *(f"{found[name]['median_ms']:.2f} ({found[name]['least_ms']:.2f})" for name in sides)]
        for case, found in results.items()
    ]
    report.print_table("Attention of 30 layers, one thread, ms: median (least)", ["", *sides], rows)
    record = {"scattered": options.scattered, "load_average": os.getloadavg(), "cases": results}
    report.save("attention", record, lambda axes: draw(axes, results, list(sides)), folder=options.out)


def draw(axes, results, names):
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(results))]
        axes.bar(places, [found[name]["median_ms"] for found in results.values()], width, label=name)
    axes.set_xticks(range(len(results)), results, rotation=20)
    axes.set_yscale("log")
    axes.set_ylabel("ms of one thread, 30 layers")
    axes.legend()


if __name__ == "__main__":
    main()
