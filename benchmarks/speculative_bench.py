"""What speculation brings: output tokens a second with it over without it, by kind of text and by load.

Spec-Bench's six categories, edits (a file is to be written again with a name changed, so most of the answer is a copy),
and the same edits with a right ``prediction``.  One model, two engines over it in turn, the same prompts in both, so
that a ratio is of neighbours in time; no prefix cache, so every prompt is new.  Greedy answers must be the same token
for token, and the benchmark ends if they are not.  Intervals are bootstrapped over pairs.
"""

import argparse
import ast
import inspect
import json
import random
import statistics
import textwrap
import time
from pathlib import Path

import numpy as np
import report
from loaded import in_engine_environment, load

DATA = Path(__file__).resolve().parent / "data" / "spec_bench_dev.jsonl"
CONCURRENCY = (1, 4, 16, 64)
EDITS, PREDICTED = "edits", "edits with prediction"


def functions_of(module):
    """The source of each function and method of a module."""
    source = Path(inspect.getsourcefile(module)).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield textwrap.dedent(ast.get_source_segment(source, node, padded=True))


def edit_prompts(count, dice):
    """Functions of the standard library, to be written again with one name changed."""
    functions = [source for module in (argparse, statistics, textwrap, random) for source in functions_of(module)]
    chosen = dice.sample([source for source in functions if 400 < len(source) < 1500], count)
    ask = "Here is a Python file:\n\n```python\n{}\n```\n\nWrite the whole file again, with `self` renamed to `this`."
    return [[{"role": "user", "content": ask.format(source)}] for source in chosen]


def spec_bench(count, dice):
    """Prompts by category, whose prompts leave room in a step's patience."""
    lines = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    categories = {}
    for line in lines:
        categories.setdefault(line["category"], []).append(line["messages"])
    return {name: dice.sample(conversations, count) for name, conversations in categories.items()}


class Bench:
    """One loaded model, and engines over it that differ in how they draft."""

    def __init__(self, options):
        from helix_gateway.engine.step_costs import measure_costs

        self.options = options
        self.tokenizer, self.runner = load(options.model, options.dtype, kv_cache_memory_bytes=2 << 30)
        self.costs = measure_costs(self.runner, (1, 2, 4, 8, 12, 16, 32, 64))

    def engine(self, drafting):
        from helix_gateway.engine.depth import AdaptiveDepth
        from helix_gateway.engine.drafters.suffix import SuffixDrafter
        from helix_gateway.engine.engine import Engine, EngineLimits
        from helix_gateway.engine.step_costs import StepCosts

        limits = EngineLimits(max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=256, max_queue_len=1000)
        known = dict(zip(self.costs.rows.astype(int).tolist(), self.costs.seconds.tolist(), strict=True))
        speculation = (
            {"drafter": SuffixDrafter(), "depth_policy": AdaptiveDepth(StepCosts(known), max_depth=32)}
            if drafting
            else {}
        )
        eos = frozenset(self.tokenizer.eos_token_ids)
        return Engine(self.runner, limits, eos_token_ids=eos, enable_prefix_caching=False, **speculation)

    def request(self, name, messages, prediction=()):
        from helix_gateway.core.request import Request, SamplingParams

        text = self.tokenizer.render_chat(messages, add_generation_prompt=True)
        return Request(
            request_id=name,
            prompt_token_ids=self.tokenizer.encode(text, add_special_tokens=False),
            sampling=SamplingParams(temperature=self.options.temperature, max_tokens=self.options.tokens, seed=1),
            prediction_token_ids=list(prediction),
        )

    def serve(self, engine, requests, streams):
        """Answers by request, seconds of decoding, and what speculation did.

        A step in which a prompt is computed is not decoding, and is left out with its tokens: prompts take the same
        time with and without speculation, and would only hide what differs.
        """
        waiting, answers, tokens, seconds, steps, rows = list(requests), {}, 0, 0.0, 0, 0
        drafted = accepted = running = 0
        while waiting or engine.has_work():
            while waiting and running < streams:
                engine.submit(waiting.pop(0))
                running += 1
            began_s = time.perf_counter()
            events = engine.step()
            elapsed_s = time.perf_counter() - began_s
            outputs = engine.last_output.step.outputs
            if all(output.scheduled.num_tokens == 1 for output in outputs):
                seconds += elapsed_s
                tokens += sum(len(event.token_ids) for event in events)
                steps += 1
                rows += sum(1 + output.num_draft_tokens for output in outputs)
            for event in events:
                answers.setdefault(event.request_id, []).extend(event.token_ids)
                if event.finish_reason:
                    running -= 1
                    drafted += event.metrics.draft_tokens
                    accepted += event.metrics.accepted_tokens
        return answers, {
            "tokens_per_s": tokens / seconds,
            "tokens_per_step": tokens / steps / min(streams, len(requests)),
            "rows_per_step": rows / steps,
            "drafted": drafted,
            "accepted": accepted,
        }


def interval(ratios, dice):
    """95 % interval of the mean of the logarithms, as a ratio."""
    logs = np.log(ratios)
    means = [statistics.fmean(dice.choices(logs.tolist(), k=len(logs))) for _ in range(2000)]
    return [float(np.exp(np.percentile(means, share))) for share in (2.5, 97.5)]


def bound(costs, off, on):
    """The ratio that the measured cost curve gives for as many tokens a step out of as many rows, if all else were free."""
    steps = on["tokens_per_step"] / off["tokens_per_step"]
    return float(steps * costs.seconds_for(off["rows_per_step"]) / costs.seconds_for(on["rows_per_step"]))


def measure(bench, name, groups, streams, dice):
    """One cell: every group of prompts without and with speculation, one after the other, the first alternating."""
    pairs, plain = [], {}
    for number, group in enumerate(groups):
        runs = {}
        for drafting in (False, True) if number % 2 == 0 else (True, False):
            if name == PREDICTED and not plain.get(number):
                requests = [bench.request(f"{number}-{i}", messages) for i, messages in enumerate(group)]
                plain[number], _ = bench.serve(bench.engine(drafting=False), requests, streams)
            known = plain.get(number, {})
            requests = [
                bench.request(f"{number}-{i}", messages, known.get(f"{number}-{i}", ()))
                for i, messages in enumerate(group)
            ]
            runs[drafting] = bench.serve(bench.engine(drafting), requests, streams)
        if runs[False][0] != runs[True][0]:
            raise SystemExit(f"{name}: speculation changed an answer")
        pairs.append((runs[False][1], runs[True][1]))
    ratios = [on["tokens_per_s"] / off["tokens_per_s"] for off, on in pairs]
    return {
        "category": name,
        "streams": streams,
        "off": statistics.median(off["tokens_per_s"] for off, _ in pairs),
        "auto": statistics.median(on["tokens_per_s"] for _, on in pairs),
        "ratio": statistics.median(ratios),
        "interval": interval(ratios, dice),
        "bound": statistics.median(bound(bench.costs, off, on) for off, on in pairs),
        "tokens_per_step": statistics.median(on["tokens_per_step"] for _, on in pairs),
        "drafted": sum(on["drafted"] for _, on in pairs),
        "accepted": sum(on["accepted"] for _, on in pairs),
        "ratios": ratios,
    }


def plot(cells):
    def draw(axes):
        names = list(dict.fromkeys(cell["category"] for cell in cells))
        levels = sorted({cell["streams"] for cell in cells})
        width = 0.8 / len(levels)
        for place, streams in enumerate(levels):
            known = {c["category"]: c for c in cells if c["streams"] == streams}
            bars = [known[name] for name in names if name in known]
            left = [number + place * width for number, name in enumerate(names) if name in known]
            errors = [[bar["ratio"] - min(bar["interval"][0], bar["ratio"]) for bar in bars]]
            errors.append([max(bar["interval"][1], bar["ratio"]) - bar["ratio"] for bar in bars])
            axes.bar(left, [bar["ratio"] for bar in bars], width, yerr=errors, label=f"{streams} streams")
        axes.axhline(1.0, color="grey", linestyle=":")
        axes.set_xticks([number + 0.4 - width / 2 for number in range(len(names))], names, rotation=30, ha="right")
        axes.set_ylabel("output tokens/s with speculation over without")
        axes.legend()

    return draw


def main():
    in_engine_environment()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="as for helix serve; left out, the default model")
    parser.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--streams", type=int, action="append", help="may be given several times")
    parser.add_argument("--tokens", type=int, default=96, help="most tokens out of each request")
    parser.add_argument("--groups", type=int, default=5, help="pairs of runs in each cell")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--category", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument(
        "--merge", action="store_true", help="keep the cells of earlier runs that this one does not repeat"
    )
    parser.add_argument("--plot-only", action="store_true", help="measure nothing: table and plot of what is there")
    options = parser.parse_args()
    if options.plot_only:
        return tell(options, earlier(options))
    dice, bench, cells = random.Random(options.seed), Bench(options), []
    for streams in options.streams or CONCURRENCY:
        size = max(1, streams)
        prompts = spec_bench(min(40, options.groups * size), dice)
        prompts[EDITS] = prompts[PREDICTED] = edit_prompts(min(24, options.groups * size), dice)
        for name in options.category or prompts:
            asked = prompts[name]
            groups = [[asked[(g * size + i) % len(asked)] for i in range(size)] for g in range(options.groups)]
            cell = measure(bench, name, groups, streams, dice)
            cells.append(cell)
            print(
                f"{streams:3} {name:24} {cell['off']:7.1f} {cell['auto']:7.1f} tokens/s, {cell['ratio']:.2f}×",
                flush=True,
            )
    measured = {(cell["category"], cell["streams"]) for cell in cells}
    kept = earlier(options) if options.merge else []
    return tell(options, [cell for cell in kept if (cell["category"], cell["streams"]) not in measured] + cells)


def earlier(options):
    """The cells that runs before this one have left."""
    path = options.out / f"speculative_{options.dtype}.json"
    return json.loads(path.read_text())["cells"] if path.exists() else []


def tell(options, cells):
    rows = [
        [
            cell["category"],
            cell["streams"],
            cell["off"],
            cell["auto"],
            cell["ratio"],
            cell.get("bound", float("nan")),
            f"{cell['interval'][0]:.2f} – {cell['interval'][1]:.2f}",
            cell["tokens_per_step"],
            f"{cell['accepted']} / {cell['drafted']}",
        ]
        for cell in cells
    ]
    columns = [
        "category",
        "streams",
        "off, tokens/s",
        "auto",
        "ratio",
        "bound",
        "95 %",
        "tokens a step",
        "accepted / drafted",
    ]
    report.print_table(f"Speculation, {options.dtype}, temperature {options.temperature}", columns, rows)
    overall = (
        statistics.geometric_mean(c["ratio"] for c in cells if c["category"] not in (EDITS, PREDICTED))
        if any(c["category"] not in (EDITS, PREDICTED) for c in cells)
        else None
    )
    report.save(
        f"speculative_{options.dtype}",
        {"dtype": options.dtype, "temperature": options.temperature, "spec_bench_overall": overall, "cells": cells},
        plot(cells),
        folder=options.out,
    )


if __name__ == "__main__":
    main()
