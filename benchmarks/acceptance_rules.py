"""Mean accepted length of Helix' rule, one noise for draft and target, beside classic rejection sampling.

Helix lets a drafter that samples use the target's own noise at the same position, and accepts a draft where both chose
the same token (Gumbel coupling; Daliri et al. 2024, "Coupling without Communication").  Classic rejection sampling
accepts a draft x with probability min(1, p(x) / q(x)) (Leviathan et al. 2023, algorithm 1).  Neither changes what the
target says.  Both are computed here from the same logits, so no timing has a part in it.

Along an answer y that the target sampled, a rule's chance to accept y_i as the draft at that place, given all before it
were accepted, is a(y_i) with

    rejection   a(y) = min(1, q(y) / p(y))
    coupled     a(y) = 1 / (p(y) * sum over x of max(p(x) / p(y), q(x) / q(y)))

the first since the chance that y is drafted and accepted is min(p, q), the second by the same division from the chance
that two Gumbel maxima with common noise both fall on y.  The mean accepted length at depth k is the mean over beginnings
of sum over i <= k of a(y_1) ... a(y_i).  As a check, drafts are also chosen with the very noise that chose the answer,
and counted.  At temperature 0 both rules ask whether the likeliest tokens are the same.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import report
import torch

from helix_gateway.core.step import SamplingRows
from helix_gateway.runtime.loading import load_model
from helix_gateway.runtime.model_source import resolve
from helix_gateway.runtime.sampling import make_sampler

DATA = Path(__file__).resolve().parent / "data" / "spec_bench_dev.jsonl"
TEMPERATURES = (0.0, 0.3, 0.7, 1.0)
DEPTHS = range(1, 9)
GROUP = 32
LEFT_OUT = 10
RULES = ("rejection", "coupled", "coupled, counted")


# ---- models


def rounded_to_4_bits(model):
    """Every linear weight as -7 to 7 times a scale for its group of 32 inputs; changes the model.

    With one scale and no offset, since the default model's file has four bits with an offset already: on that grid it
    would stay what it is.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                groups = module.weight.data.reshape(module.weight.shape[0], -1, GROUP)
                scale = (groups.abs().amax(dim=2, keepdim=True) / 7).clamp_min(1e-12)
                module.weight.data.copy_(((groups / scale).round() * scale).reshape(module.weight.shape))
    return model


def without_last_layers(model):
    del model.model.layers[-LEFT_OUT:]
    model.config.num_hidden_layers -= LEFT_OUT
    return model


def load(path):
    return load_model(path, device=torch.device("cpu"), dtype=torch.float32)


DRAFTS = {
    "4 bits": rounded_to_4_bits,
    f"without the last {LEFT_OUT} layers": without_last_layers,
}


# ---- what the target says


def prompts_of(path, options, dice):
    from helix_gateway.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    lines = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    rendered = [tokenizer.render_chat(line["messages"], add_generation_prompt=True) for line in lines]
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in rendered]
    short = [ids for ids in encoded if len(ids) <= options.prompt_tokens]
    return [short[i] for i in dice.permutation(len(short))[: options.prompts]]


def rows_of(vocab_size, temperature, positions, seeds):
    """Sampling rows at a temperature, nothing else asked for."""
    from helix_gateway.core.step import LogitEdits

    count, empty = len(positions), np.empty(0, np.int32)
    return SamplingRows(
        logits_index=np.arange(count, dtype=np.int32),
        seed=np.array(seeds, np.uint64),
        choice=np.zeros(count, np.int32),
        position=np.array(positions, np.int32),
        temperature=np.full(count, temperature, np.float32),
        top_k=np.full(count, vocab_size, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        edits=LogitEdits(empty, empty, np.empty(0, np.float32), np.empty(0, np.float32)),
    )


@torch.inference_mode()
def answer(model, sampler, prompts, temperature, tokens):
    """Continuations [prompts, tokens] as Helix samples them, each prompt with a seed of its own; all step together."""
    width, count = max(map(len, prompts)), len(prompts)
    ids = torch.zeros(count, width, dtype=torch.long)
    mask = torch.zeros(count, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    cache, said = None, []
    for step in range(tokens):
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        places = [len(prompt) + step for prompt in prompts]
        rows = rows_of(model.config.vocab_size, temperature, places, range(count))
        said.append(sampler.sample(output.logits[:, -1].float(), rows))
        ids = torch.from_numpy(said[-1].astype(np.int64))[:, None]
        mask = torch.cat([mask, torch.ones(count, 1, dtype=torch.long)], dim=1)
    return np.stack(said, axis=1)


@torch.inference_mode()
def logits_along(model, prompt, said):
    """[tokens, vocab]: what a model says at each place of an answer, given the answer before it."""
    ids = torch.tensor([[*prompt, *said[:-1].tolist()]])
    return model(ids, use_cache=False, logits_to_keep=len(said)).logits[0].float()


# ---- what the rules make of it


def chances(target, draft, said, temperature):
    """For each rule but the counted: the chance that each token of the answer is accepted, as the docstring has it."""
    if temperature == 0:
        same = (target.argmax(dim=1) == draft.argmax(dim=1)).double().numpy()
        return {"rejection": same, "coupled": same}
    p, q = (torch.log_softmax(x.double() / temperature, dim=1) for x in (target, draft))
    own_p, own_q = (x.gather(1, torch.from_numpy(said.astype(np.int64))[:, None]) for x in (p, q))
    both = torch.exp(-torch.logsumexp(torch.maximum(p - own_p, q - own_q), dim=1) - own_p[:, 0])
    return {"rejection": torch.exp((own_q - own_p)[:, 0].clamp_max(0.0)).numpy(), "coupled": both.numpy()}


def counted(sampler, draft, said, temperature, first_position, seed):
    """Whether a draft chosen with the answer's own noise is the answer's token."""
    positions = np.arange(first_position, first_position + len(said))
    rows = rows_of(draft.shape[1], temperature, positions, np.full(len(said), seed))
    return (sampler.sample(draft, rows) == said).astype(np.float64)


def accepted_lengths(accept, depth):
    """Expected accepted length of a draft of ``depth`` from each place of an answer that leaves room for it."""
    places = len(accept) - max(DEPTHS) + 1
    return np.array([np.cumprod(accept[i : i + depth]).sum() for i in range(places)])


def measure(options):
    path = resolve(options.model)
    dice, target = np.random.default_rng(options.seed), load(path)
    drafts = {name: change(load(path)) for name, change in DRAFTS.items()}
    sampler = make_sampler(torch.device("cpu"), target.config.vocab_size)
    prompts = prompts_of(path, options, dice)
    for temperature in TEMPERATURES:
        said = answer(target, sampler, prompts, temperature, options.tokens)
        kept = {(name, rule): [] for name in drafts for rule in RULES}
        agreeing = []
        answers = report.tracked(zip(prompts, said, strict=True), f"Answers at temperature {temperature}")
        for seed, (prompt, tokens) in enumerate(answers):
            along = logits_along(target, prompt, tokens)
            agreeing.append(counted(sampler, along, tokens, temperature, len(prompt), seed).mean())
            for name, model in drafts.items():
                drafted = logits_along(model, prompt, tokens)
                for rule, accept in chances(along, drafted, tokens, temperature).items():
                    kept[name, rule].append(accept)
                with_noise = counted(sampler, drafted, tokens, temperature, len(prompt), seed)
                kept[name, RULES[-1]].append(with_noise)
        print(f"temperature {temperature}: the target agrees with itself at {np.mean(agreeing):.4f}", flush=True)
        yield from cells_of(kept, temperature, options, dice)


def cells_of(kept, temperature, options, dice):
    for (name, rule), accept in kept.items():
        for depth in DEPTHS:
            by_prompt = np.array([accepted_lengths(each, depth).mean() for each in accept])
            means = by_prompt[dice.integers(0, len(by_prompt), (2000, len(by_prompt)))].mean(axis=1)
            yield {
                "draft": name,
                "rule": rule,
                "temperature": temperature,
                "depth": depth,
                "accepted": float(by_prompt.mean()),
                "interval": [float(x) for x in np.percentile(means, [2.5, 97.5])],
                "positions": len(accept) * (options.tokens - max(DEPTHS) + 1),
            }


# ---- what is shown


def of(cells, **wanted):
    return next(cell for cell in cells if all(cell[key] == value for key, value in wanted.items()))


def tokens_ratio(cells, **wanted):
    """Tokens a step of the coupled rule over those of rejection sampling; a step yields one token more than accepted."""
    coupled, rejection = (1 + of(cells, rule=rule, **wanted)["accepted"] for rule in ("coupled", "rejection"))
    return coupled / rejection


def plot(cells):
    def draw(axes):
        for name, style in zip(DRAFTS, ("-", "--"), strict=True):
            for number, temperature in enumerate(TEMPERATURES):
                ratios = [tokens_ratio(cells, draft=name, temperature=temperature, depth=depth) for depth in DEPTHS]
                axes.plot([*DEPTHS], ratios, style, color=f"C{number}", label=f"{name}, T = {temperature}")
        axes.set_xlabel("draft tokens a step")
        axes.set_ylabel("tokens a step, coupled over rejection sampling")
        axes.legend(fontsize=7)

    return draw


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="as for helix serve; left out, the default model")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=80, help="of the longest prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    cells = list(measure(options))
    rows = []
    for name in DRAFTS:
        for temperature in TEMPERATURES:
            for depth in (1, 3, 5, 8):
                where = {"draft": name, "temperature": temperature, "depth": depth}
                found = [of(cells, rule=rule, **where) for rule in RULES]
                lengths = [f"{cell['accepted']:.2f}" for cell in found]
                rows.append([name, temperature, depth, *lengths, f"{tokens_ratio(cells, **where):.3f}"])
    columns = ["draft", "temperature", "depth", *RULES, "tokens a step, ratio"]
    report.print_table("Mean accepted length", columns, rows)
    settings = {"prompts": options.prompts, "prompt_tokens": options.prompt_tokens, "tokens": options.tokens}
    report.save("acceptance_rules", {**settings, "cells": cells}, plot(cells), folder=options.out)


if __name__ == "__main__":
    sys.exit(main())
