"""What a step costs beside the model: planning, drafting, the depth policy, batch, sampling, verification, accounts.

Sixteen sequences, or as many as are asked for, whose answers are predicted rightly, in windows of four (three drafts
each), through the whole engine on the default model, at OpenAI's defaults and greedy; and the same without speculation.  The runs take turns, so that
all see the same machine, and each step is split into the parts that it spent its time in, each part without those
inside it.  A share is a median over steps of the part's time over the step's, which a busy machine moves little.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import report
from loaded import in_engine_environment, load

DATA = Path(__file__).resolve().parent / "data" / "spec_bench_dev.jsonl"
DRAFTS = 3
CASES = {
    "temperature 1": {"temperature": 1.0},
    "greedy": {"temperature": 0.0},
}
MODEL = "forward"
COMPILED = (MODEL, "sample")
"""What is computed; the rest is Python."""
BOOKKEEPING = ("policy", "drafts")
"""What exists for speculation alone."""


class Stopwatch:
    """Seconds by part since it was emptied; a part's time is its own, without that of parts inside it."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self._inside = [0.0]

    def wrap(self, owner, name, part):
        function = getattr(owner, name)

        def timed(*arguments, **options):
            self._inside.append(0.0)
            began_s = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                elapsed_s = time.perf_counter() - began_s
                self.seconds[part] += elapsed_s - self._inside.pop()
                self._inside[-1] += elapsed_s

        setattr(owner, name, timed)

    def take(self):
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


def watch_modules(watch):
    """Functions of the decoder's module; engines come and go, these stay."""
    from helix_gateway.engine import decoder

    for name, part in {
        "lay_out": "batch",
        "build_step_batch": "batch",
        "build_sampling_rows": "sampling rows",
        "with_masks": "sampling rows",
        "verify": "verify",
    }.items():
        watch.wrap(decoder, name, part)


def watch_engine(watch, engine, policy):
    watch.wrap(engine._scheduler, "schedule", "plan")
    watch.wrap(engine._decoder._drafter, "propose", "drafts")
    watch.wrap(engine._decoder.ledger, "count", "drafts")
    watch.wrap(engine, "_commit", "commit")
    for name in ("most", "choose", "learn", "observe"):
        watch.wrap(policy, name, "policy")


class Bench:
    """One loaded model, and what its conversations are answered by it."""

    def __init__(self, options):
        from helix_gateway.engine.step_costs import measure_costs

        self.options = options
        self.tokenizer, self.runner = load(options.model, options.dtype, kv_cache_memory_bytes=1 << 30)
        self.costs = measure_costs(self.runner, (1, 4, 16, 64))
        self.watch = Stopwatch()
        self.watch.wrap(self.runner, "forward", MODEL)
        self.watch.wrap(self.runner, "sample", "sample")
        watch_modules(self.watch)
        lines = DATA.read_text(encoding="utf-8").splitlines()
        # Short prompts of all categories: what a step costs beside the model does not depend on them.
        lines = sorted(lines, key=len)[: options.sequences]
        self.conversations = [json.loads(line)["messages"] for line in lines]

    def requests(self, sampling, predictions):
        from helix_gateway.core.request import Request, SamplingParams

        for number, messages in enumerate(self.conversations):
            text = self.tokenizer.render_chat(messages, add_generation_prompt=True)
            yield Request(
                request_id=f"r{number}",
                prompt_token_ids=self.tokenizer.encode(text, add_special_tokens=False),
                sampling=SamplingParams(seed=number, max_tokens=self.options.tokens, ignore_eos=True, **sampling),
                prediction_token_ids=predictions.get(f"r{number}", []),
            )

    def run(self, sampling, *, predictions):
        """Answers, and a list of (seconds of a step, seconds by part) for steps that only decode."""
        from helix_gateway.engine.depth import AdaptiveDepth, FixedDepth
        from helix_gateway.engine.drafters.none import NoDrafter
        from helix_gateway.engine.drafters.suffix import SuffixDrafter
        from helix_gateway.engine.engine import Engine, EngineLimits

        limits = EngineLimits(max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=512, max_queue_len=1000)
        drafter, policy = NoDrafter(), FixedDepth(0)
        if predictions:
            drafter, policy = SuffixDrafter(), AdaptiveDepth(self.costs, max_depth=DRAFTS, min_depth=DRAFTS)
        engine = Engine(self.runner, limits, drafter=drafter, depth_policy=policy, enable_prefix_caching=False)
        watch_engine(self.watch, engine, policy)
        for request in self.requests(sampling, predictions):
            engine.submit(request)
        answers, steps = defaultdict(list), []
        while engine.has_work():
            self.watch.take()
            began_s = time.perf_counter()
            events = engine.step()
            elapsed_s = time.perf_counter() - began_s
            outputs = engine.last_output.step.outputs
            if len(outputs) == len(self.conversations) and all(o.scheduled.num_tokens == 1 for o in outputs):
                steps.append((elapsed_s, self.watch.take()))
            for event in events:
                answers[event.request_id] += event.token_ids
        return dict(answers), steps


def summary(steps):
    """Medians: ms of a step and of its parts, and their shares."""
    parts = sorted({part for _, seconds in steps for part in seconds})
    split = [
        {part: seconds.get(part, 0.0) for part in parts} | {"rest": whole - sum(seconds.values())}
        for whole, seconds in steps
    ]
    wholes = [whole for whole, _ in steps]

    def share_of(names):
        return statistics.median(sum(row.get(n, 0.0) for n in names) / w for row, w in zip(split, wholes, strict=True))

    every = [*parts, "rest"]
    return {
        "steps": len(steps),
        "step_ms": statistics.median(wholes) * 1e3,
        "parts_ms": {part: statistics.median(row[part] for row in split) * 1e3 for part in every},
        "beside_the_model": share_of([part for part in every if part != MODEL]),
        "python_and_scheduling": share_of([part for part in every if part not in COMPILED]),
        "policy_and_drafts": share_of(BOOKKEEPING),
        "sampling_and_verification": share_of(["sample", "sampling rows", "verify"]),
    }


def measure(bench):
    runs = defaultdict(list)
    known = {case: bench.run(sampling, predictions={})[0] for case, sampling in CASES.items()}
    for _ in range(bench.options.repeats):
        for case, sampling in CASES.items():
            for window, predictions in ((1, {}), (1 + DRAFTS, known[case])):
                answers, steps = bench.run(sampling, predictions=predictions)
                if answers != known[case]:
                    raise SystemExit(f"{case}: speculation changed an answer")
                runs[case, window] += steps
    return [{"case": case, "window": window, **summary(steps)} for (case, window), steps in runs.items()]


def plot(results):
    def draw(axes):
        labels = [f"{r['case']}\nwindows of {r['window']}" for r in results]
        bottom = [0.0] * len(results)
        for part in dict.fromkeys(part for r in results for part in r["parts_ms"] if part != MODEL):
            heights = [r["parts_ms"].get(part, 0.0) for r in results]
            axes.bar(labels, heights, bottom=bottom, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set_ylabel("ms of a step beside the model's forward")
        axes.legend()

    return draw


def main():
    in_engine_environment()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="as for helix serve; left out, the default model")
    parser.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="out of each sequence")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case, in turn")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    bench = Bench(parser.parse_args())
    results = measure(bench)
    rows = [
        [
            r["case"],
            r["window"],
            r["steps"],
            r["step_ms"],
            f"{100 * r['beside_the_model']:.2f}",
            f"{100 * r['python_and_scheduling']:.2f}",
            f"{100 * r['sampling_and_verification']:.2f}",
            f"{100 * r['policy_and_drafts']:.2f}",
            "  ".join(f"{part} {ms:.2f}" for part, ms in r["parts_ms"].items() if part != MODEL),
        ]
        for r in results
    ]
    columns = ["", "window", "steps", "step, ms", "beside model, %", "Python, %", "sampling, %", "policy + drafts, %"]
    columns.append("parts, ms")
    report.print_table(f"{bench.options.sequences} sequences, {bench.options.dtype}", columns, rows)
    report.save(
        f"step_overhead_{bench.options.dtype}_{bench.options.sequences}",
        {"dtype": bench.options.dtype, "sequences": bench.options.sequences, "cells": results},
        plot(results),
        folder=bench.options.out,
    )


if __name__ == "__main__":
    main()
