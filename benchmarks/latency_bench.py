"""What clients of ``helix serve`` wait for: first tokens, the time between tokens, and ``/health`` under full load.

A real server of the real model and real HTTP clients, all on the same cores; prompts of the lengths of ShareGPT's, no
two alike, answers of one length.  Each level is a closed loop of so many streams.  While it runs, ``/health`` is asked
every 50 ms: a probe that waits says that the gateway's loop was held up.
"""

import argparse
import asyncio
import contextlib
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import aiohttp
import report

from helix_gateway.cli.load.level import Concurrency, Limit
from helix_gateway.cli.load.prompts import RequestOptions, synthetic
from helix_gateway.cli.load.session import Plan, Session
from helix_gateway.cli.load.summary import Spread
from helix_gateway.cli.openai_client import OpenAIClient

STREAMS = (1, 2, 4, 8, 16)
PROBE_S = 0.05


@contextlib.contextmanager
def server(options):
    """A server in a process of its own; its URL."""
    command = [sys.executable, "-m", "helix_gateway", "serve", *([options.model] if options.model else [])]
    command += ["--port", "0", "--dtype", options.dtype]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield re.search(r"http://\S+", next(line for line in process.stdout if "listens" in line))[0]
        finally:
            process.terminate()


async def probe(url, waits_s):
    """Ask ``/health`` again and again and write down how long each answer took."""
    async with aiohttp.ClientSession() as session:
        while True:
            began_s = time.perf_counter()
            async with session.get(url + "/health") as response:
                await response.read()
                assert response.status == 200, response.status
            waits_s.append(time.perf_counter() - began_s)
            await asyncio.sleep(PROBE_S)


async def measure(url, options):
    """All levels; for each its summary and the waits for ``/health``."""
    levels = []
    base_url = url if url.endswith("/v1") else url + "/v1"
    async with OpenAIClient(base_url, timeout_s=600) as client:
        asked = RequestOptions(model=await client.only_model(None), max_tokens=options.tokens, ignore_eos=True)
        prompts = synthetic(options.seed)
        for streams in report.tracked(STREAMS, "Numbers of streams"):
            limit = Limit(requests=max(options.requests, streams * 3))
            session = Session(client, Plan(asked, [Concurrency(streams)], limit), prompts)
            waits_s = []
            probing = asyncio.create_task(probe(url.removesuffix("/v1"), waits_s))
            await session.run()
            probing.cancel()
            await asyncio.wait({probing})
            levels.append({"streams": streams, **asdict(session.summaries[0]), "health_s": asdict(Spread.of(waits_s))})
    return levels


def ms(spread, *names):
    return " / ".join(f"{spread[name] * 1e3:.1f}" for name in names)


def plot(levels):
    def draw(axes):
        for name, label in (("ttft_s", "first token"), ("gap_s", "between tokens"), ("health_s", "/health")):
            for share, style in (("p50", "-"), ("p99", ":")):
                waits = [level[name][share] * 1e3 for level in levels]
                axes.plot(STREAMS, waits, style, marker="o", label=f"{label}, {share}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(STREAMS, STREAMS)
        axes.set_xlabel("streams")
        axes.set_ylabel("ms")
        # Lines are anywhere.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)

    return draw


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="as for helix serve; left out, the default model")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=64, help="tokens out of each request")
    parser.add_argument("--requests", type=int, default=16, help="requests of a level, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    with server(options) as url:
        levels = asyncio.run(measure(url, options))
    rows = [
        [
            level["streams"],
            level["output_tokens_per_s"],
            ms(level["ttft_s"], "p50", "p90", "p99"),
            ms(level["gap_s"], "p50", "p99"),
            ms(level["health_s"], "p50", "p99"),
            level["failed"],
        ]
        for level in levels
    ]
    columns = ["streams", "output tokens/s", "first token ms, p50 / p90 / p99", "between tokens ms, p50 / p99"]
    report.print_table(f"helix serve, {options.dtype}", [*columns, "/health ms, p50 / p99", "errors"], rows)
    report.save("latency", {"dtype": options.dtype, "levels": levels}, plot(levels), folder=options.out)


if __name__ == "__main__":
    main()
