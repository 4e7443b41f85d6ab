"""What choosing tokens costs on this CPU: the compiled sampler beside softmax, sort and multinomial in torch.

Both get the same logits in the same run, in turn: a few calls of one, a few of the other, several times over, since
threads of either spin for a while after a call.  A figure is the median of whole calls, with what Python adds.
Logits are normal with a deviation of 3 over the vocabulary: a flat row, in which nearly every token could be drawn,
which is the dear case for a sampler that skips what cannot win.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

from helix_gateway.runtime.cpu.threads import engine_environment

os.environ.update(engine_environment())

import numpy as np
import report
import torch

from helix_gateway.core.step import LogitEdits, SamplingRows
from helix_gateway.runtime.sampling import make_sampler

OPTIONS = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "temperature 0.3": {"temperature": 0.3},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50": {"top_k": 50},
    "min_p 0.05": {"min_p": 0.05},
    "all three": {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
    "penalties": {"edits": 200},
}
BURSTS, BURST_S = 3, 0.1
LOGPROBS = "logprobs, top 20"


def sampling_rows(count, vocab_size, options, random):
    edits = options.get("edits", 0)
    ids = np.concatenate([random.choice(vocab_size, edits, replace=False) for _ in range(count)]).astype(np.int32)
    return SamplingRows(
        logits_index=np.arange(count, dtype=np.int32),
        seed=random.integers(0, 2**64, count, dtype=np.uint64),
        choice=np.zeros(count, np.int32),
        position=np.full(count, 300, np.int32),
        temperature=np.full(count, options.get("temperature", 1.0), np.float32),
        top_k=np.full(count, options.get("top_k", vocab_size), np.int32),
        top_p=np.full(count, options.get("top_p", 1.0), np.float32),
        min_p=np.full(count, options.get("min_p", 0.0), np.float32),
        edits=LogitEdits(
            np.repeat(np.arange(count, dtype=np.int32), edits),
            ids,
            np.full(count * edits, 1.1, np.float32),
            np.full(count * edits, -0.5, np.float32),
        ),
    )


def in_torch(logits, rows, options):
    """The usual way: a distribution, sorted where it must be, and a draw from it."""
    if options.get("temperature") == 0.0:
        return logits.argmax(dim=1)
    if options.get("edits"):
        where = (torch.from_numpy(rows.edits.rows).long(), torch.from_numpy(rows.edits.token_ids).long())
        old = logits[where]
        logits = logits.clone()
        logits[where] = torch.where(old > 0, old / 1.1, old * 1.1) - 0.5
    p = torch.softmax(logits / options.get("temperature", 1.0), dim=1)
    if not options.keys() & {"top_k", "top_p", "min_p"}:
        return torch.multinomial(p, 1).squeeze(1)
    p, ids = p.sort(dim=1, descending=True)
    p[p < options.get("min_p", 0.0) * p[:, :1]] = 0.0
    p[:, options.get("top_k", p.shape[1]) :] = 0.0
    p[p.cumsum(dim=1) - p >= options.get("top_p", 1.0) * p.sum(dim=1, keepdim=True)] = 0.0
    return ids.gather(1, torch.multinomial(p, 1)).squeeze(1)


def logprobs_in_torch(logits, ids):
    logs = torch.log_softmax(logits, dim=1)
    own = logs.gather(1, ids)
    return own, (logs > own).sum(dim=1) + 1, logs.topk(20, dim=1)


def pairs(logits, vocab_size, random):
    """(name, compiled call, torch call) of everything measured for these rows."""
    count, sampler = logits.shape[0], make_sampler(torch.device("cpu"), vocab_size)
    for name, options in OPTIONS.items():
        rows = sampling_rows(count, vocab_size, options, random)
        yield (
            name,
            lambda rows=rows: sampler.sample(logits, rows),
            lambda rows=rows, options=options: in_torch(logits, rows, options),
        )
    index, ids = np.arange(count, dtype=np.int32), random.integers(0, vocab_size, count).astype(np.int32)
    wide = torch.from_numpy(ids.astype(np.int64)).unsqueeze(1)
    yield LOGPROBS, lambda: sampler.logprobs(logits, index, ids, 20), lambda: logprobs_in_torch(logits, wide)


def timed(call):
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def some_times(call):
    """Times of one call after another for a little while, in ms; the first is not counted."""
    times, start = [], time.perf_counter()
    call()
    while not times or time.perf_counter() - start < BURST_S:
        times.append(timed(call))
    return times


def compare(compiled, plain):
    """Both in turn: median and least of ours, median of theirs."""
    ours, theirs = [], []
    for _ in range(BURSTS):
        ours += some_times(compiled)
        theirs += some_times(plain)
    return {"helix_ms": statistics.median(ours), "helix_least_ms": min(ours), "torch_ms": statistics.median(theirs)}


def measure(vocab_size, counts):
    results = []
    for count in counts:
        random = np.random.default_rng(count)
        logits = torch.from_numpy((random.normal(size=(count, vocab_size)) * 3).astype(np.float32))
        for name, compiled, plain in report.tracked(pairs(logits, vocab_size, random), f"Sampling {count} rows"):
            results.append({"what": name, "rows": count} | compare(compiled, plain))
    return results


def print_table(results, vocab_size):
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"One call over rows of {vocab_size:,} logits, median ms")
    for column in ("", "rows", "Helix", "least", "torch", "times"):
        table.add_column(column, justify="left" if not column else "right")
    for r in results:
        figures = (f"{r['helix_ms']:.3f}", f"{r['helix_least_ms']:.3f}", f"{r['torch_ms']:.2f}")
        table.add_row(r["what"], str(r["rows"]), *figures, f"{r['torch_ms'] / r['helix_ms']:.1f}")
    Console().print(table)


def plot(results, path):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["what"] for r in results))
    counts = sorted({r["rows"] for r in results})
    figure, axes = plt.subplots(1, len(counts), figsize=(4 * len(counts), 4), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], counts, strict=True):
        rows = [next(r for r in results if r["what"] == n and r["rows"] == count) for n in names]
        at = np.arange(len(names))
        axis.barh(at - 0.2, [r["helix_ms"] for r in rows], 0.4, label="Helix")
        axis.barh(at + 0.2, [r["torch_ms"] for r in rows], 0.4, label="torch")
        axis.set(xscale="log", xlabel="ms", title=f"{count} rows", yticks=at, yticklabels=names)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab-size", type=int, default=49_152)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    results = measure(arguments.vocab_size, arguments.rows)
    print_table(results, arguments.vocab_size)
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    report = {"vocab_size": arguments.vocab_size, "machine": machine, "torch": torch.__version__, "results": results}
    (arguments.output / "sampling.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(results, arguments.output / "sampling.png")


if __name__ == "__main__":
    main()
