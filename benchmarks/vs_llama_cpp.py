"""Helix beside llama.cpp's server: the same model, the same prompts, real HTTP clients, all on the same cores.

One server runs at a time, each setting is started anew for every round, and rounds are interleaved, so that whatever
else the machine does falls on all alike.  **Cold**: a server sees each prompt once.  **Hot**: the same prompts once
more.  Prompts are Spec-Bench's, answers greedy and of one length.  llama.cpp is measured with the file as shipped
(Q4_1) and with the two for which its kernels are faster, without and with its own n-gram speculation; a ratio is to
the best of all of these in its row.
"""

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import llama_cpp_peer
import psutil
import report

from helix_gateway.cli.load.level import Concurrency, Limit
from helix_gateway.cli.load.prompts import Prompt, RequestOptions, synthetic
from helix_gateway.cli.load.session import Plan, Session
from helix_gateway.cli.openai_client import OpenAIClient
from helix_gateway.runtime.model_source import resolve

DATA = Path(__file__).resolve().parent / "data" / "spec_bench_dev.jsonl"
STREAMS = (1, 2, 4, 8, 16, 32)
PREFILL_TOKENS = (128, 512, 2048, 6000)
START_S = 300


@dataclass(frozen=True)
class Setting:
    """One server as it is started for a round."""

    name: str
    command: tuple[str, ...]
    """What is run; {port} and {parallel} and {context} stand for numbers."""

    @property
    def is_helix(self):
        return self.name.startswith("helix")


def helix(name, *flags):
    command = (sys.executable, "-m", "helix_gateway", "serve", "--port", "{port}", "--max-num-seqs", "{parallel}")
    return Setting(f"helix {name}", command + flags)


def llama(kind, file, speculation):
    script = str(Path(llama_cpp_peer.__file__))
    command = (sys.executable, script, str(file), "--port", "{port}", "--parallel", "{parallel}")
    name = f"llama.cpp {kind}" + (" ngram" if speculation == llama_cpp_peer.NGRAM else "")
    return Setting(name, (*command, "--context", "{context}", "--speculation", speculation))


HELIX = [
    helix(f"{name} {speculation}", *flags, "--speculation", speculation)
    for name, flags in (
        ("float32", ("--dtype", "float32")),
        ("bfloat16", ("--dtype", "bfloat16")),
        ("int8, KV int8", ("--quantization", "int8", "--kv-cache-dtype", "int8")),
        ("Q4_1, KV float32", ("--quantization", "auto", "--kv-cache-dtype", "float32")),
        ("Q4_1, KV int8", ("--quantization", "auto", "--kv-cache-dtype", "int8")),
    )
    for speculation in ("off", "auto")
]


def peers(folder):
    shipped = resolve(None)
    files = {"Q4_1": shipped} | {kind: llama_cpp_peer.requantised(shipped, kind, folder) for kind in ("Q4_0", "Q8_0")}
    return [llama(kind, path, how) for kind, path in files.items() for how in ("off", llama_cpp_peer.NGRAM)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(setting, parallel, context):
    """Start it, wait until it answers, and end it: its base URL, seconds to ready, and its process."""
    port = free_port()
    numbers = {"port": port, "parallel": parallel, "context": context}
    command = [part.format(**numbers) for part in setting.command]
    began_s = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}/v1"
            asyncio.run(ready(url, process))
            yield url, time.perf_counter() - began_s, process
        finally:
            process.stdin.close()
            process.terminate()


async def ready(url, process):
    """Until one token was answered."""
    for _ in range(START_S * 10):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        with contextlib.suppress(Exception):
            async with OpenAIClient(url, timeout_s=60) as client:
                options = RequestOptions(model=await client.only_model(None), max_tokens=1)
                await Session(client, Plan(options, [], Limit(requests=1), warm_up=1), iter(())).run()
                return
        await asyncio.sleep(0.1)
    raise RuntimeError(f"the server did not answer within {START_S} s")


def resident_bytes(process):
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(member.memory_info().rss for member in family)


def spec_bench(seed):
    """All prompts in an order of their own, none of them twice."""
    lines = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    prompts = [Prompt(line["messages"]) for line in lines]
    random.Random(seed).shuffle(prompts)
    return prompts


async def measure_levels(url, options, prompts):
    """Each level cold, then the same prompts hot: {streams: {"cold": summary, "hot": summary}}."""
    figures, taken = {}, 0
    async with OpenAIClient(url, timeout_s=600) as client:
        asked = RequestOptions(model=await client.only_model(None), max_tokens=options.tokens, ignore_eos=True)
        for streams in options.streams:
            count = max(options.requests, 2 * streams)
            own = [prompts[place % len(prompts)] for place in range(taken, taken + count)]
            taken += count
            level = {}
            for heat in ("cold", "hot"):
                plan = Plan(asked, [Concurrency(streams)], Limit(requests=count), warm_up=0)
                session = Session(client, plan, iter(own))
                await session.run()
                level[heat] = shown(session.summaries[0])
            figures[str(streams)] = level
    return figures


def shown(summary):
    if summary.failed:
        raise RuntimeError(f"requests failed: {summary.errors}")
    return {
        "tokens_per_s": summary.output_tokens_per_s,
        "ttft_ms": summary.ttft_s.p50 * 1e3,
        "gap_ms": summary.gap_s.p50 * 1e3,
    }


async def measure_prefill(url, lengths, seed):
    """Prompt tokens a second of one new prompt at a time, by its length."""
    figures = {}
    async with OpenAIClient(url, timeout_s=600) as client:
        asked = RequestOptions(model=await client.only_model(None), max_tokens=1)
        for length in lengths:
            words = " ".join(next(synthetic(seed + place)).messages[0]["content"] for place in range(length // 50))
            prompt = Prompt([{"role": "user", "content": f"{seed} {length} " + " ".join(words.split()[:length])}])
            session = Session(client, Plan(asked, [Concurrency(1)], Limit(requests=1), warm_up=0), iter([prompt]))
            await session.run()
            summary = session.summaries[0]
            figures[str(length)] = summary.prompt_tokens / summary.ttft_s.p50
    return figures


def measure(setting, options, number):
    """One round of one setting."""
    with server(setting, max(options.streams), 2048) as (url, ready_s, process):
        levels = asyncio.run(measure_levels(url, options, spec_bench(number)))
        found = {"ready_s": ready_s, "levels": levels, "resident_bytes": resident_bytes(process)}
    if options.prefill:
        with server(setting, 1, 8192) as (url, _, _):
            found["prefill_tokens_per_s"] = asyncio.run(measure_prefill(url, PREFILL_TOKENS, 1000 * number))
    return found


def parts(found, *path):
    """A round's figure, or None where that round did not measure it."""
    for part in path:
        found = found.get(part)
        if found is None:
            return None
    return found


def medians(results, *path, scale=1.0):
    """Each setting's median over the rounds that measured it: {setting: median}."""
    figures = {name: [parts(found, *path) for found in rounds] for name, rounds in results.items()}
    measured = {name: [value for value in values if value is not None] for name, values in figures.items()}
    return {name: scale * statistics.median(values) for name, values in measured.items() if values}


def levels_of(results, key):
    """What was measured under a key, in any round, as numbers in order."""
    return sorted({int(level) for rounds in results.values() for found in rounds for level in found.get(key, {})})


def rows_of(results):
    """Each thing measured, by name: {setting: median}, and whether more is better."""
    rows = {}
    for streams in levels_of(results, "levels"):
        for heat in ("cold", "hot"):
            for figure, better in (("tokens_per_s", 1), ("ttft_ms", -1), ("gap_ms", -1)):
                rows[f"{figure}, {heat}, {streams}"] = medians(results, "levels", str(streams), heat, figure), better
    for length in levels_of(results, "prefill_tokens_per_s"):
        rows[f"prefill tokens_per_s, {length}"] = medians(results, "prefill_tokens_per_s", str(length)), 1
    rows["resident MB"] = medians(results, "resident_bytes", scale=1e-6), -1
    rows["ready s"] = medians(results, "ready_s"), -1
    return rows


def ratio(mine, figures, better):
    """How many times better than llama.cpp's best."""
    theirs = [value for name, value in figures.items() if not name.startswith("helix")]
    if not theirs:
        return None
    return mine / max(theirs) if better > 0 else min(theirs) / mine


def print_rows(rows):
    names = list(dict.fromkeys(name for figures, _ in rows.values() for name in figures))
    table = []
    for what, (figures, better) in rows.items():
        cells = []
        for name in names:
            if name not in figures:
                cells.append("")
                continue
            times = ratio(figures[name], figures, better) if name.startswith("helix") else None
            cells.append(f"{figures[name]:.4g}" + (f" ({times:.2f}x)" if times is not None else ""))
        table.append([what, *cells])
    report.print_table("Helix beside llama.cpp (in brackets: times its best)", ["", *names], table)


def plot(rows, streams):
    def draw(axes):
        for name in rows[f"tokens_per_s, cold, {streams[0]}"][0]:
            values = [rows[f"tokens_per_s, cold, {count}"][0].get(name, math.nan) for count in streams]
            style = "-" if name.startswith("helix") else ":"
            axes.plot(streams, values, style, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(streams, streams)
        axes.set_xlabel("clients at once, every prompt new")
        axes.set_ylabel("output tokens/s")
        axes.legend(fontsize=7)

    return draw


def joined(files):
    """The rounds of several runs on one machine, as those of one; and how many tokens were asked of each request."""
    results, tokens = {}, set()
    for file in files:
        run = json.loads(file.read_text(encoding="utf-8"))
        tokens.add(run["tokens"])
        for name, rounds in run["rounds"].items():
            results.setdefault(name, []).extend(rounds)
    if len(tokens) > 1:
        raise SystemExit(f"These runs asked for different numbers of tokens: {sorted(tokens)}.")
    return results, tokens.pop()


def keep(results, tokens, folder, machine=None):
    """The table, the JSON and the picture of what was measured so far."""
    rows = rows_of(results)
    figures = {"tokens": tokens, "rounds": results, "medians": {what: row[0] for what, row in rows.items()}}
    streams = levels_of(results, "levels")
    report.save("vs_llama_cpp", figures | (machine or {}), plot(rows, streams), folder=folder)
    return rows


def run(options):
    """Every setting in turn, round after round; what is had is kept after each round."""
    options.files.mkdir(parents=True, exist_ok=True)
    every = HELIX + peers(options.files)
    settings = [setting for setting in every if any(re.search(word, setting.name) for word in options.only)]
    results = {setting.name: [] for setting in settings}
    for number in range(options.rounds):
        for setting in settings:
            print(f"round {number + 1}: {setting.name}", flush=True)
            results[setting.name].append(measure(setting, options, number))
        rows = keep(results, options.tokens, options.out)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--requests", type=int, default=8, help="requests of a level, at least")
    parser.add_argument("--tokens", type=int, default=96, help="tokens out of each request")
    parser.add_argument("--only", nargs="+", default=[""], help="settings whose names contain one of these")
    parser.add_argument("--prefill", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--files", type=Path, default=Path("build/peer"), help="where the peer's other files are kept")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument(
        "--join", type=Path, nargs="+", help="measure nothing: join the rounds of these runs' JSON files"
    )
    options = parser.parse_args()
    if options.join:
        taken_on = json.loads(options.join[0].read_text(encoding="utf-8"))
        of_the_runs = {key: taken_on[key] for key in ("when", "revision", "machine")}
        rows = keep(*joined(options.join), options.out, of_the_runs)
    else:
        rows = run(options)
    print_rows(rows)


if __name__ == "__main__":
    main()
