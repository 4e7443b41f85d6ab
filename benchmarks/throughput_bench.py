"""Output tokens a second with 1 to 16 streams, in float32 and bfloat16, beside transformers' own ``generate``.

Helix runs as a library (`HelixEngine`) in this process, transformers as a plain call of ``generate`` for one stream in
a process of its own, so that their threads do not meet; the two in turn, in every repeat, greedily, on prompts of the
same length.  No prompt is used twice, so nothing is found in a cache.
"""

import argparse
import multiprocessing
import random
import statistics
import time
from pathlib import Path

import report

from helix_gateway import HelixEngine
from helix_gateway.runtime.model_source import resolve

STREAMS = (1, 2, 4, 8, 16)
PROMPT_TOKENS = 32


def prompts(count, dice):
    """Random tokens: their values do not change what a step costs."""
    return [[dice.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def helix_tokens_per_s(engine, streams, new_tokens, dice):
    start = time.perf_counter()
    results = engine.generate(prompts(streams, dice), temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    seconds = time.perf_counter() - start
    return sum(len(result.token_ids) for result in results) / seconds


def serve_peer(pipe, model_name, dtype):
    """The peer's process: answers each (prompt, tokens) with the seconds that ``generate`` took."""
    import torch

    from helix_gateway.runtime.loading import load_model

    model = load_model(resolve(model_name), device=torch.device("cpu"), dtype=getattr(torch, dtype))
    pipe.send(torch.get_num_threads())
    while (job := pipe.recv()) is not None:
        prompt, new_tokens = job
        with torch.inference_mode():
            start = time.perf_counter()
            model.generate(
                torch.tensor([prompt]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )
            pipe.send(time.perf_counter() - start)


class Peer:
    """transformers' generate in a process of its own."""

    def __init__(self, model_name, dtype):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_peer, args=(theirs, model_name, dtype))
        self.process.start()
        theirs.close()
        self.threads = self.pipe.recv()

    def tokens_per_s(self, new_tokens, dice):
        (prompt,) = prompts(1, dice)
        self.pipe.send((prompt, new_tokens))
        return new_tokens / self.pipe.recv()

    def close(self):
        self.pipe.send(None)
        self.process.join()


def measure(dtype, options):
    dice = random.Random(options.seed)
    peer = Peer(options.model, dtype)
    figures = {streams: [] for streams in STREAMS}
    peer_figures = []
    with HelixEngine(options.model, dtype=dtype, kv_cache_memory_bytes=2 << 30) as engine:
        helix_tokens_per_s(engine, 4, 8, dice)
        peer.tokens_per_s(4, dice)
        for _ in range(options.repeats):
            for streams in STREAMS:
                figures[streams].append(helix_tokens_per_s(engine, streams, options.tokens, dice))
            peer_figures.append(peer.tokens_per_s(options.tokens, dice))
    peer.close()
    return {
        "dtype": dtype,
        "transformers_threads": peer.threads,
        "helix": {streams: statistics.median(values) for streams, values in figures.items()},
        "helix_all": figures,
        "transformers_1": statistics.median(peer_figures),
        "transformers_all": peer_figures,
    }


def show(results):
    rows = []
    for result in results:
        helix = result["helix"]
        for streams in STREAMS:
            rows.append(
                [
                    result["dtype"],
                    streams,
                    helix[streams],
                    helix[streams] / helix[1],
                    helix[streams] / result["transformers_1"],
                ]
            )
        rows.append([result["dtype"], "transformers, 1", result["transformers_1"], "", 1.0])
    columns = ["dtype", "streams", "output tokens/s", "× one stream", "× transformers generate"]
    report.print_table("Throughput", columns, rows)


def plot(results):
    def draw(axes):
        for result in results:
            axes.plot(
                STREAMS, [result["helix"][streams] for streams in STREAMS], marker="o", label=f"Helix {result['dtype']}"
            )
            axes.axhline(result["transformers_1"], linestyle=":", color="grey")
        axes.set_xscale("log", base=2)
        axes.set_xticks(STREAMS, STREAMS)
        axes.set_xlabel("streams (dotted: transformers generate, one stream)")
        axes.set_ylabel("output tokens/s")
        axes.set_ylim(bottom=0)
        axes.legend()

    return draw


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="as for helix serve; left out, the default model")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=64, help="tokens out of each stream")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    results = [measure(dtype, options) for dtype in options.dtype or ["float32", "bfloat16"]]
    show(results)
    report.save("throughput", {"results": results, "tokens": options.tokens}, plot(results), folder=options.out)


if __name__ == "__main__":
    main()
