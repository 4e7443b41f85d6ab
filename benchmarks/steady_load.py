"""Whether memory stays flat under steady load: the real model, so many streams at all times, for as long as you like.

    python benchmarks/steady_load.py --minutes 30

A real `helix serve` with its defaults and real HTTP clients, without faults: prompts and answers of the lengths of
ShareGPT's, no two alike, the next as soon as an answer has ended; at the end those that run are left.  Resident memory of
gateway and engine is read every ten seconds; the KV cache's pages take theirs when first written, so it has a size that is
full long before the last half.  Prints and writes what was served and how memory grew over the last half, draws it, and
exits with 1 where a request failed or memory grew by more than the share that is allowed.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compat_tests.serving import start_server, stop_server  # noqa: E402
from helix_gateway.cli.load.level import Concurrency, Level, Limit  # noqa: E402
from helix_gateway.cli.load.prompts import RequestOptions, synthetic  # noqa: E402
from helix_gateway.cli.load.summary import summarise  # noqa: E402
from helix_gateway.cli.openai_client import OpenAIClient  # noqa: E402

EVERY_S = 10.0
MOST_GROWTH = 0.02
"""Of resident memory over the last half."""


@dataclass
class Memory:
    """Resident bytes of both processes at one moment."""

    s: float
    gateway_bytes: int
    engine_bytes: int


def engine_of(gateway):
    """The engine's process, a child of the gateway's."""
    return next(child for child in gateway.children() if any("engine_process" in word for word in child.cmdline()))


async def watch(process, moments):
    """Write down memory again and again, until cancelled."""
    gateway = psutil.Process(process.pid)
    engine, began_s = engine_of(gateway), time.perf_counter()
    while True:
        sizes = gateway.memory_info().rss, engine.memory_info().rss
        moments.append(Memory(time.perf_counter() - began_s, *sizes))
        await asyncio.sleep(EVERY_S)


def growth(moments, key):
    """By what share it grew over the last half: of the half's last fifth over its first."""
    sizes = [getattr(moment, key) for moment in moments[len(moments) // 2 :]]
    part = max(1, len(sizes) // 5)
    return statistics.median(sizes[-part:]) / statistics.median(sizes[:part]) - 1


async def load(server, options, moments):
    """The whole load; the level's summary."""
    async with OpenAIClient(server.base_url, timeout_s=600) as client:
        asked = RequestOptions(await client.only_model(None))
        bodies = (asked.body(prompt) for prompt in synthetic(options.seed))
        level = Level(client, "chat", bodies, Concurrency(options.streams), Limit(duration_s=60 * options.minutes))
        # Streams that run then are left, so that at no time there are fewer.
        asyncio.get_running_loop().call_later(60 * options.minutes, level.interrupt)
        watching = asyncio.create_task(watch(server.process, moments))
        try:
            await level.run()
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
    return summarise(level)


def draw(axes, moments, summary):
    minutes = [moment.s / 60 for moment in moments]
    for name in ("engine", "gateway"):
        axes.plot(minutes, [getattr(moment, f"{name}_bytes") / 2**20 for moment in moments], label=name)
    title = f"{summary.finished:,} requests, {summary.load}, {summary.output_tokens_per_s:.0f} tokens/s"
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", title=title, ylim=0)
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="as for helix serve; left out, the default model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--kv-cache-memory", default="1GiB", help="as for helix serve: some 90,000 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    moments = []
    flags = ["--kv-cache-memory", options.kv_cache_memory, "--log-level", "warning"]
    server = start_server(*([options.model] if options.model else []), *flags, timeout_s=600)
    try:
        summary = asyncio.run(load(server, options, moments))
    finally:
        stop_server(server)
    grown = {name: growth(moments, f"{name}_bytes") for name in ("gateway", "engine")}
    rows = [
        [name, f"{getattr(moments[-1], f'{name}_bytes') / 2**20:.0f}", f"{100 * share:+.2f}"]
        for name, share in grown.items()
    ]
    report.print_table(f"{summary.load}, {summary.elapsed_s:.0f} s", ["", "MiB at the end", "growth, %"], rows)
    print(f"{summary.finished} requests, {summary.failed} failed {summary.errors}")
    print("The server said:", *server.lines, sep="\n  ")
    report.save(
        "steady_load",
        {
            "seconds": summary.elapsed_s,
            "kv_cache_memory": options.kv_cache_memory,
            "load": asdict(summary),
            "growth_over_the_last_half": grown,
            "memory": [asdict(moment) for moment in moments],
        },
        lambda axes: draw(axes, moments, summary),
        folder=options.out,
    )
    raise SystemExit(0 if not summary.failed and max(grown.values()) <= MOST_GROWTH else 1)


if __name__ == "__main__":
    main()
