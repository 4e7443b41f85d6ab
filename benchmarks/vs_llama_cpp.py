"""Helix beside llama.cpp's server: the same model, the same prompts, real HTTP clients, all on the same cores.

    pip install --no-deps xllamacpp     # the peer; it brings its own server
    python benchmarks/vs_llama_cpp.py --parts levels --streams 1 4 16 --only 'Q4_1, KV int8 off$' llama --out build/levels
    python benchmarks/vs_llama_cpp.py --join build/*/vs_llama_cpp.json

One server runs at a time, each setting is started anew for every part of every round, and rounds are interleaved, so
that whatever else the machine does falls on all alike.  Parts: Spec-Bench's prompts at several numbers of clients, edits
(for Helix also with a right ``prediction``), prompts alone by length, long prompts with a short answer, and many requests
over one beginning; ``server_loads.py`` has them.  llama.cpp is measured with the file as shipped (Q4_1) and with the two
for which its kernels are faster, without and with its own n-gram speculation; a ratio is to the best of all of these in
its row, its 95 % interval, where there are three rounds or more, Student's over the rounds' own ratios.  Settings of
Helix that end in AVX2 leave out what the peer's wheel has not been compiled for.
"""

import argparse
import asyncio
import itertools
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import report
from edits import ANSWER_TOKENS
from ratios import interval
from server_loads import LONG_TOKENS, PARTS, PREFILL_TOKENS, SHARERS
from servers import helix_settings, peer_settings, resident_bytes, server

STREAMS = (1, 2, 4, 8, 16, 32)
FIGURES = {"tokens_per_s": 1, "ttft_ms": -1, "gap_ms": -1}
"""Of a level: more is better, or less."""
HEATS = ("cold", "hot", "predicted")
FEWEST_ROUNDS = 3
"""For an interval."""


@dataclass(frozen=True)
class Row:
    """One figure, in all settings."""

    what: str
    path: tuple[str, ...]
    """Where it lies in what a round has found."""
    better: int = 1
    """1: more is better; -1: less."""
    scale: float = 1.0
    peers_path: tuple[str, ...] | None = None
    """Where the peers' lies, if elsewhere."""

    def values(self, name, rounds):
        """The figure in each round that measured it."""
        path = self.path if is_helix(name) or self.peers_path is None else self.peers_path
        found = [at(each, path) for each in rounds]
        return [self.scale * value for value in found if value is not None]


def is_helix(name):
    return name.startswith("helix")


def at(found, path):
    """A round's figure, or None where that round did not measure it."""
    for part in path:
        found = found.get(part)
        if found is None:
            return None
    return found


def levels_of(results, key):
    """What was measured under a key, in any round, as numbers in order."""
    return sorted({int(level) for rounds in results.values() for found in rounds for level in found.get(key, {})})


def heats_of(results, key):
    """Of a kind of level, "cold" and what else was measured, in any round."""
    found = [level for rounds in results.values() for each in rounds for level in each.get(key, {}).values()]
    return [heat for heat in HEATS if any(heat in level for level in found)]


def rows_of(results):
    """All that was measured."""
    beside = {"predicted": "cold"}
    for key in ("levels", "edits"):
        each = itertools.product(levels_of(results, key), heats_of(results, key), FIGURES.items())
        for streams, heat, (figure, better) in each:
            name = f"{figure}, {heat}, {streams}" if key == "levels" else f"{key} {figure}, {heat}, {streams}"
            peers = (key, str(streams), beside.get(heat, heat), figure)
            yield Row(name, (key, str(streams), heat, figure), better, peers_path=peers)
    for length in levels_of(results, "prefill_tokens_per_s"):
        yield Row(f"prefill tokens_per_s, {length}", ("prefill_tokens_per_s", str(length)))
    for length, (figure, better) in itertools.product(levels_of(results, "long"), FIGURES.items()):
        yield Row(f"long {figure}, {length}", ("long", str(length), figure), better)
    for heat, (figure, better) in itertools.product(("cold", "hot"), FIGURES.items()):
        yield Row(f"shared prefix {figure}, {heat}", ("prefix", heat, figure), better)
    yield Row("resident MB", ("resident_bytes",), -1, 1e-6)
    yield Row("ready s", ("ready_s",), -1)


def measured(row, results):
    """{setting: its figure in each round}, of those settings that have it."""
    known = {name: row.values(name, rounds) for name, rounds in results.items()}
    return {name: values for name, values in known.items() if values}


def best_peer(row, known):
    """The name of llama.cpp's best setting, by medians; None where there is none."""
    theirs = {name: row.better * statistics.median(values) for name, values in known.items() if not is_helix(name)}
    return max(theirs, key=theirs.get, default=None)


def beside(row, mine, theirs):
    """How many times better: of medians, and its interval over rounds, None where there are too few or they do not pair."""
    times = (statistics.median(mine) / statistics.median(theirs)) ** row.better
    paired = len(mine) == len(theirs) >= FEWEST_ROUNDS
    each = [(one / other) ** row.better for one, other in zip(mine, theirs, strict=False)]
    return {"ratio": times, "interval": interval(each) if paired else None}


def compare(results):
    """{row: {setting: {"median", "best", "ratio", "interval"}}}; the last three for Helix, where there is a peer."""
    table = {}
    for row in rows_of(results):
        known = measured(row, results)
        best = best_peer(row, known)
        cells = {name: {"median": statistics.median(values)} for name, values in known.items()}
        for name in filter(is_helix, known) if best else ():
            cells[name] |= {"best": best, **beside(row, known[name], known[best])}
        if cells:
            table[row.what] = cells
    return table


def print_compared(table):
    """A table for each setting of Helix, or, where none was measured, of the peer."""
    names = list(dict.fromkeys(name for cells in table.values() for name in cells))
    for name in list(filter(is_helix, names)) or names:
        lines = [line(what, cells, name) for what, cells in table.items() if name in cells]
        report.print_table(name, ["", "", "llama.cpp's best", "which", "times better", "95 %"], lines)


def line(what, cells, name):
    cell = cells[name]
    if "best" not in cell:
        return [what, f"{cell['median']:.4g}", "", "", "", ""]
    known = "{:.2f} – {:.2f}".format(*cell["interval"]) if cell["interval"] else ""
    best = f"{cells[cell['best']]['median']:.4g}"
    return [what, f"{cell['median']:.4g}", best, cell["best"], f"{cell['ratio']:.2f}", known]


def plot(table, streams):
    """Output tokens/s of each setting of Helix over clients, and of whichever of the peer's is best there."""
    levels = [table[f"tokens_per_s, cold, {count}"] for count in streams]

    def draw(axes):
        for name in dict.fromkeys(name for cells in levels for name in cells if is_helix(name)):
            axes.plot(
                streams, [cells.get(name, {}).get("median", math.nan) for cells in levels], marker="o", label=name
            )
        theirs = [[cell["median"] for name, cell in cells.items() if not is_helix(name)] for cells in levels]
        best = [max(medians, default=math.nan) for medians in theirs]
        axes.plot(streams, best, ":", color="black", marker="o", label="llama.cpp, its best setting at each")
        axes.set_ylim(bottom=0)
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
        has_edits = any("edits" in parts for rounds in run["rounds"].values() for parts in rounds)
        if has_edits and run.get("edit_tokens") != ANSWER_TOKENS:
            raise SystemExit(f"{file} has edits whose answers are not of {ANSWER_TOKENS} tokens.")
        for name, rounds in run["rounds"].items():
            results.setdefault(name, []).extend(rounds)
    if len(tokens) > 1:
        raise SystemExit(f"These runs asked for different numbers of tokens: {sorted(tokens)}.")
    return results, tokens.pop()


def keep(results, tokens, folder, machine=None):
    """The JSON, and the picture where clients were counted, of what was measured so far; the table."""
    table = compare(results)
    streams = levels_of(results, "levels")
    figures = {"tokens": tokens, "edit_tokens": ANSWER_TOKENS, "rounds": results, "compared": table}
    report.save("vs_llama_cpp", figures | (machine or {}), plot(table, streams) if streams else None, folder=folder)
    return table


def measure(setting, options, number):
    """One round of one setting: each part at a server of its own."""
    found = {}
    for part in map(PARTS.get, options.parts):
        with server(setting, part.parallel(options), part.context) as (url, ready_s, process):
            found[part.key] = asyncio.run(part.visit(url, setting, options, number))
            if part.key == "levels":
                found |= {"ready_s": ready_s, "resident_bytes": resident_bytes(process)}
    return found


def run(options):
    """Every setting in turn, round after round; what is had is kept after each round."""
    options.files.mkdir(parents=True, exist_ok=True)
    every = helix_settings(options.files) + peer_settings(options.files)
    settings = [setting for setting in every if any(re.search(word, setting.name) for word in options.only)]
    results = {setting.name: [] for setting in settings}
    for number in range(options.first_round, options.first_round + options.rounds):
        for setting in settings:
            print(f"round {number + 1}: {setting.name}", flush=True)
            results[setting.name].append(measure(setting, options, number))
        table = keep(results, options.tokens, options.out)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--first-round", type=int, default=0, help="of several runs to be joined: rounds before this one"
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--requests", type=int, default=8, help="requests of a level, at least")
    parser.add_argument(
        "--tokens", type=int, default=96, help=f"tokens out of each request, but for edits, which have {ANSWER_TOKENS}"
    )
    parser.add_argument("--prefill-tokens", type=int, nargs="+", default=list(PREFILL_TOKENS), help="prompts' lengths")
    parser.add_argument("--long-tokens", type=int, nargs="+", default=list(LONG_TOKENS), help="long prompts' lengths")
    parser.add_argument("--sharers", type=int, default=SHARERS, help="requests at once over one beginning")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="settings in whose names one of these regular expressions is found"
    )
    parser.add_argument("--files", type=Path, default=Path("build/peer"), help="where the peer's other files are kept")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument(
        "--join", type=Path, nargs="+", help="measure nothing: join the rounds of these runs' JSON files"
    )
    options = parser.parse_args()
    if options.join:
        taken_on = json.loads(options.join[0].read_text(encoding="utf-8"))
        of_the_runs = {key: taken_on[key] for key in ("when", "revision", "machine")}
        table = keep(*joined(options.join), options.out, of_the_runs)
    else:
        table = run(options)
    print_compared(table)


if __name__ == "__main__":
    main()
