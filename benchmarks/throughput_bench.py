"""Output tokens a second, and how long people wait for them, with 1 to 32 streams, beside a plain loop of ``generate``.

Helix runs as a library (`HelixEngine`) in this process, transformers as a loop of ``generate`` calls, one prompt after
another, in a process of its own, so that their threads do not meet; the two in turn, in every repeat, greedily, on
prompts of the same length.  All prompts of a level are there at its beginning: what a prompt of the loop waits for its
turn counts to its first token, as it does for Helix's.  No prompt is used twice, so nothing is found in a cache, and
speculation is off: what that brings `speculative_bench.py` tells.  With dtype ``auto`` Helix computes as `helix serve` does
by default, on a processor with quantised weights, keys and values; transformers, which has no such thing, in float32.
"""

import argparse
import itertools
import multiprocessing
import random
import statistics
import time
from pathlib import Path

import report

from helix_gateway import HelixEngine
from helix_gateway.runtime.model_source import resolve

STREAMS = (1, 2, 4, 8, 16, 32)
PEER_STREAMS = (1, 4)
"""The loop is as fast with more prompts, and its last prompt waits longer: two levels tell."""
PROMPT_TOKENS = 32


def prompts(count, dice):
    """Random tokens: their values do not change what a step costs."""
    return [[dice.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def helix_times(engine, streams, new_tokens, dice):
    """For each prompt the seconds from the level's beginning to each of its tokens."""
    results = engine.generate(prompts(streams, dice), temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    return [result.metrics.token_times_s for result in results]


class _Clock:
    """A streamer of transformers' that writes down when tokens come; the first call brings the prompt."""

    def __init__(self, began_s):
        self._began_s = began_s
        self.calls = []

    def put(self, _tokens):
        self.calls.append(time.perf_counter() - self._began_s)

    def end(self):
        pass


def serve_peer(pipe, model_name, dtype):
    """The peer's process: answers each (prompts, tokens) with the times of all tokens."""
    import torch

    from helix_gateway.runtime.loading import load_model

    model = load_model(resolve(model_name), device=torch.device("cpu"), dtype=getattr(torch, dtype))
    pipe.send(torch.get_num_threads())
    while (job := pipe.recv()) is not None:
        asked, new_tokens = job
        began_s, times = time.perf_counter(), []
        for prompt in asked:
            clock = _Clock(began_s)
            with torch.inference_mode():
                model.generate(
                    torch.tensor([prompt]),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                    streamer=clock,
                )
            times.append(clock.calls[1:])
        pipe.send(times)


class Peer:
    """transformers' generate in a process of its own."""

    def __init__(self, model_name, dtype):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_peer, args=(theirs, model_name, dtype))
        self.process.start()
        theirs.close()
        self.threads = self.pipe.recv()

    def times(self, streams, new_tokens, dice):
        self.pipe.send((prompts(streams, dice), new_tokens))
        return self.pipe.recv()

    def close(self):
        self.pipe.send(None)
        self.process.join()


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def figures(runs):
    """One level's figures out of its repeats: medians of rates, percentiles of all waits."""
    rates = [sum(map(len, times)) / max(map(max, times)) for times in runs]
    first = [1e3 * times[0] for run in runs for times in run]
    gaps = [1e3 * (after - before) for run in runs for times in run for before, after in itertools.pairwise(times)]
    return {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_all": rates,
        "first_token_ms": {"p50": percentile(first, 0.5), "p99": percentile(first, 0.99)},
        "between_tokens_ms": {"p50": percentile(gaps, 0.5), "p99": percentile(gaps, 0.99)},
    }


def measure(dtype, options):
    dice = random.Random(options.seed)
    peer_dtype = "float32" if dtype == "auto" else dtype
    peer = Peer(options.model, peer_dtype)
    helix, loop = {streams: [] for streams in STREAMS}, {streams: [] for streams in PEER_STREAMS}
    with HelixEngine(options.model, dtype=dtype, kv_cache_memory_bytes=2 << 30, speculation="off") as engine:
        helix_times(engine, 4, 8, dice)
        peer.times(1, 4, dice)
        turns = [streams for _ in range(options.repeats) for streams in STREAMS]
        for streams in report.tracked(turns, f"Throughput, {dtype}"):
            helix[streams].append(helix_times(engine, streams, options.tokens, dice))
            if streams in PEER_STREAMS:
                loop[streams].append(peer.times(streams, options.tokens, dice))
    peer.close()
    return {
        "dtype": dtype,
        "transformers_dtype": peer_dtype,
        "transformers_threads": peer.threads,
        "helix": {streams: figures(runs) for streams, runs in helix.items()},
        "transformers": {streams: figures(runs) for streams, runs in loop.items()},
    }


def rows_of(result):
    alone, peer = result["helix"][1]["tokens_per_s"], result["transformers"][1]["tokens_per_s"]
    for name in ("helix", "transformers"):
        for streams, level in result[name].items():
            rate, first, between = level["tokens_per_s"], level["first_token_ms"], level["between_tokens_ms"]
            yield [
                result["dtype"],
                f"{name}, {streams}",
                rate,
                rate / alone if name == "helix" else "",
                rate / peer,
                f"{first['p50']:.0f} / {first['p99']:.0f}",
                f"{between['p50']:.1f} / {between['p99']:.1f}",
            ]


def show(results):
    columns = ["dtype", "streams", "output tokens/s", "× one stream", "× loop of generate"]
    columns += ["first token ms, p50 / p99", "between tokens ms, p50 / p99"]
    report.print_table("Throughput", columns, [row for result in results for row in rows_of(result)])


def plot(results):
    def draw(axes):
        for result in results:
            rates = [result["helix"][streams]["tokens_per_s"] for streams in STREAMS]
            (line,) = axes.plot(STREAMS, rates, marker="o", label=f"Helix {result['dtype']}")
            plain = [result["transformers"][1]["tokens_per_s"]] * len(STREAMS)
            axes.plot(STREAMS, plain, "--", color=line.get_color(), label=f"generate beside it, {plain[0]:.0f}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(STREAMS, STREAMS)
        axes.set_xlabel("streams (dashed: a loop of transformers' generate)")
        axes.set_ylabel("output tokens/s, all streams together")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 0.12))

    return draw


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="as for helix serve; left out, the default model")
    parser.add_argument("--dtype", action="append", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=64, help="tokens out of each stream")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    results = [measure(dtype, options) for dtype in options.dtype or ["auto", "float32", "bfloat16"]]
    show(results)
    report.save("throughput", {"results": results, "tokens": options.tokens}, plot(results), folder=options.out)


if __name__ == "__main__":
    main()
