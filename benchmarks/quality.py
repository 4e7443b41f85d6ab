"""What coarser weights, keys and values cost in quality: perplexity and greedy agreement on real text.

Each candidate reads the same text, the documentation of Python's language that ships with it (`pydoc_data.topics`), in
windows that know nothing of one another, and says at each token how likely the next one was and which it would have
picked.  Beside the first candidate, the reference, stand the ratio of perplexities (with the standard error of its
logarithm over windows) and the share of tokens at which both pick the same.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import report
import torch

from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.factory import load_runner
from helix_gateway.runtime.model_source import resolve
from helix_gateway.text.sample_text import sample_ids
from helix_gateway.text.tokenizer import Tokenizer

CHUNK = 256
CANDIDATES = {
    "float32": {"dtype": "float32", "kv_cache_dtype": "float32"},
    "bfloat16 KV": {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
    "int8 KV": {"dtype": "float32", "kv_cache_dtype": "int8"},
    "file's weights": {"quantization": "auto", "kv_cache_dtype": "float32"},
    "int8 weights": {"quantization": "int8", "kv_cache_dtype": "float32"},
    "file's weights, int8 KV": {"quantization": "auto", "kv_cache_dtype": "int8"},
    "int8 weights, int8 KV": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4 weights": {"quantization": "int4", "kv_cache_dtype": "float32"},
    "int4 weights, int8 KV": {"quantization": "int4", "kv_cache_dtype": "int8"},
}
"""What `load_runner` is told; the first is the reference.  "file's weights, int8 KV" is the default for a GGUF, "int8 weights,
int8 KV" for other files."""


@dataclass(frozen=True)
class Reading:
    """What a model made of a text."""

    losses: np.ndarray
    """[windows, window - 1], minus the logarithm of each next token's probability."""
    picks: np.ndarray
    """[windows, window - 1], the likeliest next token."""

    @property
    def perplexity(self):
        return float(np.exp(self.losses.mean()))


def real_text():
    """English prose with code in it, from the standard library."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def windows_of(text, tokenizer, count, length):
    """[count, length] token ids from places all over the text."""
    ids = np.array(tokenizer.encode(text), np.int32)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return np.stack([ids[start : start + length] for start in starts])


def read(runner, windows):
    """A `Reading` of windows [count, length], one after another in chunks over the first pages of the runner's pool."""
    losses, picks = [], []
    for window in windows:
        parts = [_read_chunk(runner, window, first) for first in range(0, len(window) - 1, CHUNK)]
        losses.append(np.concatenate([part[0] for part in parts]))
        picks.append(np.concatenate([part[1] for part in parts]))
    return Reading(np.stack(losses), np.stack(picks))


def _read_chunk(runner, window, first):
    last = min(first + CHUNK, len(window) - 1)
    positions = np.arange(first, last, dtype=np.int32)
    (group,) = runner.kv_groups
    batch = StepBatch(
        token_ids=window[first:last],
        positions=positions,
        cu_seqlens=np.array([0, last - first], np.int32),
        context_lens=np.array([last], np.int32),
        block_tables=(np.arange(-(-last // group.tokens_per_block), dtype=np.int32)[None],),
        logits_rows=positions - first,
    )
    logits = runner.forward(batch)
    following = torch.from_numpy(window[first + 1 : last + 1]).long()[:, None]
    losses = torch.logsumexp(logits, 1) - logits.gather(1, following)[:, 0]
    return losses.double().numpy(), logits.argmax(1).numpy()


def compare(reading, reference):
    """One reading beside another of the same windows."""
    gaps = (reading.losses - reference.losses).mean(1)
    return {
        "perplexity": reading.perplexity,
        "perplexity_change_percent": 100 * float(np.expm1(gaps.mean())),
        "standard_error_percent": 100 * float(gaps.std(ddof=1) / np.sqrt(len(gaps))),
        "greedy_agreement": float((reading.picks == reference.picks).mean()),
        "tokens": reading.losses.size,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=769)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument(
        "--name", default="quality", help="of the files that are written; for another model than the default"
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    path = resolve(options.model)
    windows = windows_of(real_text(), Tokenizer.load(path), options.windows, options.length)
    results, reference = {}, None
    for name in options.candidates:
        wanted = {"max_tokens_in_use": 2 * options.length, "sample_ids": sample_ids, **CANDIDATES[name]}
        loaded = load_runner(path, device="cpu", **wanted)
        reading = read(loaded.runner, report.tracked(windows, name))
        reference = reference or reading
        results[name] = compare(reading, reference)
        report.save(options.name, {"candidates": results}, lambda axes: draw(axes, results), folder=options.out)
    keys = ("perplexity", "perplexity_change_percent", "standard_error_percent", "greedy_agreement", "tokens")
    rows = [[name, *(f"{found[key]:.4g}" for key in keys)] for name, found in results.items()]
    columns = ["", "perplexity", "change, %", "± (standard error), %", "same pick", "tokens"]
    report.print_table("Quality", columns, rows)


def draw(axes, results):
    names = list(results)
    changes = [results[name]["perplexity_change_percent"] for name in names]
    axes.bar(names, changes, yerr=[results[name]["standard_error_percent"] for name in names], capsize=4)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_ylabel("perplexity above the reference, %")


if __name__ == "__main__":
    main()
