"""What speculation brings: output tokens a second with it over without it, by drafter, kind of text and load.

Spec-Bench's six categories, edits (a file is to be written again with a name changed, so most of the answer is a copy),
and the same edits with a right ``prediction``.  A small model does not do what edits ask it to, so up to four streams
they are measured with the right answer dictated too, in which the new name has more tokens than the old, without and with
the unchanged file as ``prediction``: the model computes every step, and a constraint lets it say nothing else.  That takes a mask a
row, with and without drafts; and what ``model`` and ``self`` draft there is what they would have said.  Drafters: ``auto`` (all there are), ``suffix``, ``model`` and ``self`` each
alone; ``model`` the target's weights rounded to 4 bits, made anew where none is named, ``self`` a float target's own at
fewer bits, which ``auto`` has where ``model`` is left out.  One model, an engine for each drafter and
one without over it in turn, the same prompts in all, so that a ratio is of neighbours in time.  The target's prompts are
cached, since only steps that do nothing but decode count; a draft model's are not, and what it reads counts.  Only steps of
as many sequences as there are streams count: drafts let answers end at different steps, and whoever is left over, with
nobody to follow, says what fewer streams get (so the quick ones' whole answers count, and of the slowest those up to where
the first is left over).  What is learned of costs and acceptance is kept from group to group, as a server keeps it; earlier
answers are not.  Greedy answers must be the same token for token, and the benchmark ends if they are not.  Intervals are
Student's, over groups.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import report
from edits import ANSWER_TOKENS, real_edits, some_edits
from loaded import in_engine_environment, load_with_draft
from ratios import interval

DATA = Path(__file__).resolve().parent / "data" / "spec_bench_dev.jsonl"
MAKE_DRAFT_MODELS = Path(__file__).resolve().parent.parent / "scripts" / "make_draft_models.py"
CONCURRENCY = (1, 4, 16, 64)
DRAFTERS = ("auto", "suffix", "model", "self")
GROUPS = {1: 4}
TOKENS = {1: 40, 4: 40, 16: 32, 64: 20}
"""By streams, so that all of it takes minutes; otherwise:"""
FEWEST_GROUPS, FEWEST_TOKENS = 3, 32
REQUESTS = {4: 3, 16: 2, 64: 2}
"""A stream, one after the other, where some streams are ahead of others; otherwise one."""
MOST_LONG_EDITS = 4
"""Up to so many streams edits are answered at length, which takes longer; beyond, they are cut as short as other answers."""
FEWEST_PREDICTED_TOKENS = 64
"""The first 33 may come with the prompt's own step, which does not count."""
MOST_PROMPTS = 40
"""Of a category; many streams share them."""
POOL_BYTES = 3 << 30
EDITS, PREDICTED = "edits", "edits with prediction"
DONE, DONE_FROM_FILE = "edits done right", "edits done right, file as prediction"
ALL_EDITS = (EDITS, PREDICTED, DONE, DONE_FROM_FILE)


@dataclass(frozen=True)
class Asked:
    """One conversation, and what is known of its answer."""

    messages: Any
    dictated: str | None = None
    """The answer that the model is made to give."""
    prediction: str | None = None


class Dictation:
    """`core.protocols.TokenConstraint`: one text, then its end.

    Args:
        token_ids: of the text, with a token that ends it.
    """

    def __init__(self, token_ids):
        self._token_ids, self._place = token_ids, 0

    def fill_mask(self, mask):
        """Allow the next token alone."""
        word, bit = divmod(self._token_ids[self._place], 32)
        mask[:] = 0
        mask[word] = 1 << bit

    def advance(self, token_id):
        """Go on."""
        assert token_id == self._token_ids[self._place], "something else was said than was dictated"
        self._place += 1

    def rollback(self, num_tokens):
        """Go back."""
        self._place -= num_tokens


def spec_bench(count, dice):
    """Prompts by category, whose prompts leave room in a step's patience."""
    lines = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    categories = {}
    for line in lines:
        categories.setdefault(line["category"], []).append(line["messages"])
    return {name: [Asked(each) for each in dice.sample(known, count)] for name, known in categories.items()}


class Draft:
    """A draft model's runner, what its forwards cost, and its context."""

    def __init__(self, runner, context_length):
        from helix_gateway.engine.step_costs import measure_costs

        self.runner, self.context_length = runner, context_length
        self.costs = measure_costs(self.runner, PROFILED)


PROFILED = (1, 2, 4, 8, 12, 16, 32, 64, 128, 256)


def fresh(costs):
    """Costs as they were measured, with nothing learned since."""
    from helix_gateway.engine.step_costs import StepCosts

    return StepCosts(dict(zip(costs.rows.astype(int).tolist(), costs.seconds.tolist(), strict=True)))


class Policies:
    """What one drafter's engines learn, one after the other."""

    def __init__(self, bench, name):
        from helix_gateway.engine.acceptance import AcceptanceModel
        from helix_gateway.engine.depth import AdaptiveDepth
        from helix_gateway.engine.drafting import MODEL, SELF, AdaptiveDrafting

        acceptance, costs = AcceptanceModel(), fresh(bench.costs)
        self.draft = None if name == "suffix" else bench.own if name == "self" else bench.draft or bench.own
        self.is_own = self.draft is not None and self.draft is bench.own
        self.reads_text = name not in ("model", "self")
        self.depth = AdaptiveDepth(costs, max_depth=32, acceptance=acceptance)
        source = SELF if self.is_own else MODEL
        self.drafting = self.draft and AdaptiveDrafting(costs, fresh(self.draft.costs), acceptance, source=source)


class Bench:
    """One loaded model, and engines over it that differ in how they draft."""

    def __init__(self, options, draft_path):
        from helix_gateway.engine.step_costs import measure_costs
        from helix_gateway.runtime.fewer_bits import at_fewer_bits
        from helix_gateway.runtime.model_source import resolve

        self.options = options
        quantised = options.quantization != "none"
        self.tokenizer, target, draft = load_with_draft(
            options.model,
            draft_path,
            kv_cache_memory_bytes=POOL_BYTES,
            dtype="auto" if quantised else options.dtype,
            quantization=options.quantization,
        )
        self.runner = target.runner
        self.costs = measure_costs(self.runner, PROFILED)
        self.draft = draft and Draft(draft.runner, draft.context_length)
        self.own = (
            None if quantised else Draft(at_fewer_bits(resolve(options.model), self.runner), target.context_length)
        )
        missing = {"model"} if draft is None else set()
        self.drafters = [name for name in options.drafters if name not in missing | ({"self"} if quantised else set())]
        self.forget()
        runners = [self.runner, *([self.draft.runner] if draft else [])]
        self.cache = cold_for_drafts([group for runner in runners for group in runner.kv_groups], self.runner.num_pages)

    def forget(self):
        """Let all drafters begin to learn anew."""
        self.policies = {name: Policies(self, name) for name in self.drafters}

    def engine(self, name):
        """An engine with a drafter, or without for ``off``."""
        from helix_gateway.engine.engine import Engine, EngineLimits

        limits = EngineLimits(max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=256, max_queue_len=1000)
        return Engine(
            self.runner,
            limits,
            eos_token_ids=frozenset(self.tokenizer.eos_token_ids),
            cache=self.cache,
            **({} if name == "off" else self.speculation(self.policies[name])),
        )

    def speculation(self, policies):
        from helix_gateway.engine.drafters.chain import CostlyDrafter
        from helix_gateway.engine.drafters.model import ModelDrafter
        from helix_gateway.engine.drafters.none import NoDrafter
        from helix_gateway.engine.drafters.self_drafter import SelfDrafter
        from helix_gateway.engine.drafters.suffix import SuffixDrafter

        free = SuffixDrafter(store_tokens=0) if policies.reads_text else NoDrafter()
        chosen = {"drafter": free, "depth_policy": policies.depth}
        if policies.is_own:
            drafter = SelfDrafter(policies.draft.runner, self.cache, policies.drafting)
            chosen["costly_drafter"] = CostlyDrafter(drafter, policies.drafting)
        elif policies.draft:
            drafter = ModelDrafter(
                policies.draft.runner,
                self.cache,
                policies.drafting,
                target_vocab_size=self.runner.vocab_size,
                context_length=policies.draft.context_length,
            )
            chosen["costly_drafter"] = CostlyDrafter(drafter, policies.drafting)
        return chosen

    def request(self, name, asked, tokens, prediction=()):
        """A request, and what its sequence is held to."""
        from helix_gateway.core.request import Request, SamplingParams
        from helix_gateway.engine.engine import ChoiceHooks

        def encoded(text):
            return self.tokenizer.encode(text, add_special_tokens=False)

        text = self.tokenizer.render_chat(asked.messages, add_generation_prompt=True)
        request = Request(
            request_id=name,
            prompt_token_ids=encoded(text),
            sampling=SamplingParams(temperature=self.options.temperature, max_tokens=tokens, seed=1),
            prediction_token_ids=encoded(asked.prediction) if asked.prediction else list(prediction),
        )
        if asked.dictated is None:
            return request, ()
        return request, (ChoiceHooks(constraint=Dictation([*encoded(asked.dictated), *self.tokenizer.eos_token_ids])),)

    def serve(self, engine, requests, streams):
        """Answers by request, and how fast decoding was and what speculation did; None for that where no step counts.

        A step in which a prompt is computed is not decoding, and is left out with its tokens: prompts take the same
        time with and without speculation, and would only hide what differs.  So are steps of fewer than all streams.
        """
        waiting, answers, tokens, seconds, steps = list(requests), {}, 0, 0.0, 0
        drafted = accepted = running = 0
        while waiting or engine.has_work():
            while waiting and running < streams:
                engine.submit(*waiting.pop(0))
                running += 1
            began_s = time.perf_counter()
            events = engine.step()
            elapsed_s = time.perf_counter() - began_s
            outputs = engine.last_output.step.outputs
            if len(outputs) == streams and all(output.scheduled.num_tokens == 1 for output in outputs):
                seconds += elapsed_s
                tokens += sum(len(event.token_ids) for event in events)
                steps += 1
                drafted += sum(output.num_draft_tokens for output in outputs)
                accepted += sum(output.num_accepted for output in outputs)
            for event in events:
                answers.setdefault(event.request_id, []).extend(event.token_ids)
                running -= event.finish_reason is not None
        if not steps:
            return answers, None
        return answers, {
            "tokens_per_s": tokens / seconds,
            "tokens_per_step": tokens / steps / streams,
            "rows_per_step": streams + drafted / steps,
            "steps": steps,
            "drafted": drafted,
            "accepted": accepted,
        }


def cold_for_drafts(groups, num_pages):
    """A cache in which prompts of the target are found again, and those of a draft model are not."""
    from helix_gateway.engine.kv_cache import PagedKVCache

    class ColdForDrafts(PagedKVCache):
        def add(self, sequence, token_ids, *, host=None, reuse=True, **options):
            return super().add(sequence, token_ids, host=host, reuse=reuse and host is None, **options)

    return ColdForDrafts(groups, num_pages)


def bound(costs, off, on):
    """The ratio that the measured cost curve gives for as many tokens a step out of as many rows, if all else were free."""
    steps = on["tokens_per_step"] / off["tokens_per_step"]
    return float(steps * costs.seconds_for(off["rows_per_step"]) / costs.seconds_for(on["rows_per_step"]))


def turns(names, number):
    """Each in every place equally often, since a machine may change while they run."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def run_group(bench, name, number, group, streams, tokens, advance):
    """What each drafter, and none, made of one group of prompts; answers are compared."""
    made = {f"{number}-{i}": asked for i, asked in enumerate(group)}

    def serve(drafter, known):
        requests = [bench.request(key, asked, tokens, known.get(key, ())) for key, asked in made.items()]
        answers, figures = bench.serve(bench.engine(drafter), requests, streams)
        advance(1)
        return answers, figures

    # Whoever comes first would compute the prompts, and in their step the first tokens.
    plain, _ = serve("off", {})
    known = plain if name == PREDICTED else {}
    runs = {}
    for drafter in turns(["off", *bench.drafters], number):
        answers, runs[drafter] = serve(drafter, known if drafter != "off" else {})
        if answers != plain:
            raise SystemExit(f"{name}, {streams} streams: {drafter} changed an answer")
        if runs[drafter] is None:
            raise SystemExit(f"{name}: no step decoded {streams} streams and nothing else. Give more --tokens.")
    return runs


def measure(bench, name, groups, streams, tokens, advance):
    """One cell: every group of prompts without and with each drafter, one after the other."""
    runs = [run_group(bench, name, number, group, streams, tokens, advance) for number, group in enumerate(groups)]
    off = [run["off"] for run in runs]
    return {
        "category": name,
        "streams": streams,
        "tokens": tokens,
        "off": statistics.median(each["tokens_per_s"] for each in off),
        "drafters": {drafter: compared(bench.costs, off, [run[drafter] for run in runs]) for drafter in bench.drafters},
    }


def compared(costs, off, on):
    """One drafter's runs beside those without."""
    ratios = [new["tokens_per_s"] / old["tokens_per_s"] for old, new in zip(off, on, strict=True)]
    return {
        "tokens_per_s": statistics.median(each["tokens_per_s"] for each in on),
        "ratio": math.exp(statistics.fmean(map(math.log, ratios))),
        "interval": interval(ratios),
        "bound": statistics.median(bound(costs, *pair) for pair in zip(off, on, strict=True)),
        "tokens_per_step": statistics.fmean(each["tokens_per_step"] for each in on),
        "steps": sum(each["steps"] for each in on),
        "drafted": sum(each["drafted"] for each in on),
        "accepted": sum(each["accepted"] for each in on),
        "ratios": ratios,
    }


def plot(cells):
    """A panel for each category: a line for each drafter over the number of streams."""

    def draw(panels):
        names = list(dict.fromkeys(cell["category"] for cell in cells))
        levels = sorted({cell["streams"] for cell in cells})
        for axes in panels.flat[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(panels.flat, names, strict=False):
            own = sorted((cell for cell in cells if cell["category"] == name), key=lambda cell: cell["streams"])
            for shift, drafter in enumerate(DRAFTERS):
                known = [(cell["streams"], cell["drafters"][drafter]) for cell in own if drafter in cell["drafters"]]
                if not known:
                    continue
                places = [levels.index(streams) + 0.08 * (shift - 1) for streams, _ in known]
                ratios = [figures["ratio"] for _, figures in known]
                errors = [
                    [f["ratio"] - f["interval"][0] for _, f in known],
                    [min(f["interval"][1], 10 * f["ratio"]) - f["ratio"] for _, f in known],
                ]
                axes.errorbar(places, ratios, yerr=errors, marker="o", capsize=2, label=drafter)
            axes.axhline(1.0, color="grey", linestyle=":")
            axes.set_title(name.replace(", ", ",\n"))
            axes.set_xticks(range(len(levels)), [str(level) for level in levels])
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        figure = panels.flat[0].figure
        figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="lower right", ncols=len(DRAFTERS))
        figure.supxlabel("streams at once")
        figure.supylabel("output tokens/s over those without speculation")

    return draw


def named(options):
    """What the results are filed under."""
    return options.dtype if options.quantization == "none" else options.quantization


def draft_path(options, stack):
    """The folder of the draft model, made if need be; None where there is none, and said why."""
    if options.draft_model or "model" not in options.drafters:
        return options.draft_model
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="helix-draft-"))
    # In a process of its own: threads that torch has started once would spin beside the engine's.
    command = [sys.executable, str(MAKE_DRAFT_MODELS), folder, "--kind", "rounded"]
    command += ["--model", options.model] if options.model else []
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode == 0:
        return str(Path(folder) / "rounded")
    reason = made.stderr.strip().splitlines()[-1:] or [f"exit status {made.returncode}"]
    print(f"No draft model could be made ({reason[0]}): auto goes without, and model is left out.", flush=True)
    return None


def prompts_by_category(options):
    dice = random.Random(options.seed)
    prompts = spec_bench(MOST_PROMPTS, dice)
    chosen = some_edits(MOST_PROMPTS, dice)
    prompts[EDITS] = prompts[PREDICTED] = [Asked(edit.messages) for edit in chosen]
    changed = real_edits(MOST_PROMPTS, dice)
    prompts[DONE] = [Asked(edit.messages, edit.done) for edit in changed]
    prompts[DONE_FROM_FILE] = [
        replace(asked, prediction=edit.file) for asked, edit in zip(prompts[DONE], changed, strict=True)
    ]
    return {name: prompts[name] for name in options.category or prompts}


def tokens_for(options, name, streams):
    """Most tokens out of each request of a cell."""
    tokens = options.tokens or TOKENS.get(streams, FEWEST_TOKENS)
    if name in ALL_EDITS and streams <= MOST_LONG_EDITS and options.tokens is None:
        return ANSWER_TOKENS
    return max(FEWEST_PREDICTED_TOKENS, 2 * tokens) if name == PREDICTED else tokens


def warm_up(bench, asked):
    """What is compiled when first used would else be in some cell's time, and in the costs that a drafter has learned."""
    from helix_gateway.service.warm_up import warm_up as warm_up_served

    plain, _ = bench.serve(bench.engine("off"), [bench.request("plain", asked, 24)], 1)
    for name in ("off", *bench.drafters):
        # As a server does before its first request: what few rows do not need, many may.
        warm_up_served(bench.engine(name))
    for drafter in bench.drafters:
        for name, prediction in (("unknown", ()), ("predicted", plain["plain"])):
            bench.serve(bench.engine(drafter), [bench.request(f"{drafter} {name}", asked, 24, prediction)], 1)
    bench.forget()


def measure_all(bench, options):
    levels = options.streams or CONCURRENCY
    prompts = prompts_by_category(options)
    cells = [
        (name, asked, streams)
        for name, asked in prompts.items()
        for streams in levels
        # Short answers hardly come to the name that is changed.
        if name not in (DONE, DONE_FROM_FILE) or streams <= MOST_LONG_EDITS
    ]
    warm_up(bench, next(iter(prompts.values()))[0])
    groups = {streams: options.groups or GROUPS.get(streams, FEWEST_GROUPS) for streams in levels}
    num_runs = sum(groups[streams] for _, _, streams in cells) * (2 + len(bench.drafters))
    with report.progress("runs", num_runs) as advance:
        for name, asked, streams in cells:
            size = streams * REQUESTS.get(streams, 1)
            chosen = [[asked[(g * size + i) % len(asked)] for i in range(size)] for g in range(groups[streams])]
            yield measure(bench, name, chosen, streams, tokens_for(options, name, streams), advance)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="as for helix serve; left out, the default model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--quantization",
        default="none",
        choices=["none", "auto", "int8"],
        help="instead of a dtype; auto is the file's own",
    )
    parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS), choices=DRAFTERS)
    parser.add_argument("--draft-model", default=None, help="its folder; left out, one is made of the model")
    parser.add_argument("--streams", type=int, action="append", help="may be given several times")
    parser.add_argument(
        "--tokens",
        type=int,
        default=None,
        help=f"most out of each request; left out, {TOKENS} by streams, of edits up to {ANSWER_TOKENS}",
    )
    parser.add_argument("--groups", type=int, default=None, help="runs in each cell; left out, 4 of one stream, else 3")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--category", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--merge", action="store_true", help="keep cells of earlier runs that this one does not repeat")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing: table and plot of what is there")
    return parser.parse_args()


def main():
    in_engine_environment()
    options = arguments()
    if options.plot_only:
        return tell(options, earlier(options))
    cells = []
    with ExitStack() as stack:
        bench = Bench(options, draft_path(options, stack))
        cells.extend(measure_all(bench, options))
    measured = {(cell["category"], cell["streams"]) for cell in cells}
    kept = earlier(options) if options.merge else []
    return tell(options, [cell for cell in kept if (cell["category"], cell["streams"]) not in measured] + cells)


def earlier(options):
    """The cells that runs before this one have left; what counted steps of fewer than all streams cannot stand beside these."""
    path = options.out / f"speculative_{named(options)}.json"
    cells = json.loads(path.read_text())["cells"] if path.exists() else []
    return [
        cell for cell in cells if cell["streams"] == 1 or all("steps" in each for each in cell["drafters"].values())
    ]


def overall(cells):
    """By streams and drafter, the ratio over the whole of Spec-Bench: the geometric mean of its categories."""
    ratios = {}
    for cell in cells:
        for drafter, figures in cell["drafters"].items():
            if cell["category"] not in ALL_EDITS:
                ratios.setdefault(f"{cell['streams']} streams, {drafter}", []).append(figures["ratio"])
    return {which: statistics.geometric_mean(known) for which, known in ratios.items()}


def table(cells):
    for cell in cells:
        for drafter, figures in cell["drafters"].items():
            low, high = figures["interval"]
            yield [
                cell["category"],
                cell["streams"],
                drafter,
                cell["off"],
                figures["tokens_per_s"],
                figures["ratio"],
                f"{low:.2f} – {high:.2f}" + (" below 1" if high < 1 else ""),
                figures["bound"],
                figures["tokens_per_step"],
                f"{figures['accepted']} / {figures['drafted']}",
            ]


def tell(options, cells):
    columns = ["category", "streams", "drafter", "off, tokens/s", "with it", "ratio", "95 %", "bound"]
    columns += ["tokens a step", "accepted / drafted"]
    report.print_table(f"Speculation, {named(options)}, temperature {options.temperature}", columns, list(table(cells)))
    whole = overall(cells)
    report.print_table("The whole of Spec-Bench", ["", "ratio"], list(whole.items()))
    report.save(
        f"speculative_{named(options)}",
        {"weights": named(options), "temperature": options.temperature, "spec_bench_overall": whole, "cells": cells},
        plot(cells),
        folder=options.out,
        size=(16, 6),
        facets=(2, 5),
    )


if __name__ == "__main__":
    main()
