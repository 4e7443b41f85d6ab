"""What drafts off known text are worth, answer by answer, in virtual time.

Answers are recorded once (the default model's greedy ones to Spec-Bench's six categories and to edits, and those that do
what an edit asks) and then replayed through the product's own drafter and depth policy: what is drafted is held against the
answer, and a step takes what a cost curve says.  So drafters can be compared to a tenth of a per cent on any machine,
however busy: run it before and after a change of the drafter.  One sequence at a time, what is learned kept from answer to
answer of a category; earlier answers are not drafted from.  What drafting itself takes is not counted.

    python benchmarks/draft_replay.py --answers build/answers.json      # recorded first where the file is not there
"""

import argparse
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import report
from edits import ANSWER_TOKENS, real_edits, some_edits
from speculative_bench import DONE, DONE_FROM_FILE, spec_bench

from helix_gateway import HelixEngine
from helix_gateway.engine.depth import AdaptiveDepth
from helix_gateway.engine.drafters.suffix import SuffixDrafter
from helix_gateway.engine.step_costs import StepCosts

COSTS_MS = {1: 6.2, 2: 6.6, 4: 8.0, 8: 11.5, 16: 17.6, 32: 29.0, 64: 55.0}
"""By rows: the file's own blocks on two cores of a Cascade Lake Xeon in a quiet hour."""
MAX_DEPTH = 32
PROMPTS, EDITS, TOKENS = 16, 32, 128


def recorded():
    """Prompts, answers and predictions in tokens, by category."""
    dice = random.Random(7)
    asked = {"edits": [edit.messages for edit in some_edits(EDITS, dice)]}
    asked |= {name: [each.messages for each in known] for name, known in spec_bench(PROMPTS, dice).items()}
    with HelixEngine(speculation="off") as engine:

        def encoded(text):
            return [int(token) for token in engine.tokenizer.encode(text, add_special_tokens=False)]

        def prompt(messages):
            return encoded(engine.tokenizer.render_chat(messages, add_generation_prompt=True))

        def answers(name):
            prompts = [prompt(messages) for messages in asked[name]]
            most = ANSWER_TOKENS if name == "edits" else TOKENS
            return [
                {"prompt": asked_ids, "answer": [int(token) for token in result.token_ids], "prediction": []}
                for asked_ids, result in zip(
                    prompts, engine.generate(prompts, max_tokens=most, temperature=0), strict=True
                )
            ]

        found = {name: answers(name) for name in asked}
        edits = real_edits(EDITS, dice)
        done = [{"prompt": prompt(edit.messages), "answer": encoded(edit.done), "prediction": []} for edit in edits]
        predicted = [known | {"prediction": encoded(edit.file)} for known, edit in zip(done, edits, strict=True)]
        return found | {DONE: done, DONE_FROM_FILE: predicted}


def sequence(number, known):
    """What drafter and policy see of one sequence, which has its first token."""
    request = SimpleNamespace(
        prediction_token_ids=known["prediction"],
        cache_salt="",
        sampling=SimpleNamespace(max_tokens=len(known["answer"])),
    )
    return SimpleNamespace(
        key=(str(number), 0),
        request=request,
        token_ids=[*known["prompt"], *known["answer"][:1]],
        num_prompt_tokens=len(known["prompt"]),
        num_output_tokens=1,
        finish_reason=None,
    )


def replay(answers):
    """One category's figures."""
    costs = StepCosts({rows: ms / 1e3 for rows, ms in COSTS_MS.items()})
    drafter, policy = SuffixDrafter(store_tokens=0), AdaptiveDepth(costs, max_depth=MAX_DEPTH)
    tokens = steps = 0
    seconds, by_source = 0.0, {}
    for number, known in enumerate(answers):
        one, answer = sequence(number, known), known["answer"]
        while one.num_output_tokens < len(answer):
            left = answer[one.num_output_tokens :]
            drafted, depth = verified(drafter, policy, one, len(left) - 1)
            agreed = 0
            while agreed < depth and drafted.token_ids[agreed] == left[agreed]:
                agreed += 1
            got = left[: agreed + 1]
            if drafted is not None:
                policy.learn(one, drafted, np.array(got, np.int32))
            if depth:
                counts = by_source.setdefault(drafted.source, [0, 0, 0])
                for place, more in enumerate((1, depth, agreed)):
                    counts[place] += more
            one.token_ids += got
            one.num_output_tokens += len(got)
            tokens, steps, seconds = tokens + len(got), steps + 1, seconds + costs.seconds_for(1 + depth)
        one.finish_reason = "abort"  # nothing is remembered of it
        drafter.retire(one)
        policy.retire(one)
    return {
        "tokens": tokens,
        "tokens_per_step": tokens / steps,
        "times_plain": tokens * costs.seconds_for(1) / seconds,
        "sources": {
            source: dict(zip(("drafts", "drafted", "accepted"), counts, strict=True))
            for source, counts in by_source.items()
        },
    }


def verified(drafter, policy, one, most):
    """The draft of a step, if anything is drafted, and how much of it is verified."""
    depth = min(most, policy.most(one, 1))
    if depth <= 0:
        return None, 0
    (drafted,) = drafter.propose([one], [depth])
    if not len(drafted.token_ids):
        return None, 0
    (depth,) = policy.choose([one], [drafted], 1)
    return drafted, depth


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, help="kept there, and taken from there; left out, recorded anew")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    if options.answers is not None and options.answers.exists():
        answers = json.loads(options.answers.read_text(encoding="utf-8"))
    else:
        answers = recorded()
        if options.answers is not None:
            options.answers.parent.mkdir(parents=True, exist_ok=True)
            options.answers.write_text(json.dumps(answers), encoding="utf-8")
    figures = {name: replay(known) for name, known in answers.items()}
    rows = [
        [
            name,
            each["tokens"],
            each["tokens_per_step"],
            each["times_plain"],
            ", ".join(f"{source} {c['accepted']} of {c['drafted']}" for source, c in each["sources"].items()),
        ]
        for name, each in figures.items()
    ]
    columns = ["answers", "tokens", "tokens a step", "times plain decoding", "accepted of drafted"]
    report.print_table("Drafts off known text, replayed", columns, rows)

    def plot(axes):
        names = list(figures)[::-1]
        axes.barh(names, [figures[name]["times_plain"] for name in names])
        axes.axvline(1.0, color="grey", linestyle=":")
        axes.set_xlabel("times plain decoding, in virtual time")

    report.save("draft_replay", {"costs_ms": COSTS_MS, "categories": figures}, plot, folder=options.out)


if __name__ == "__main__":
    main()
