"""The depth policy against the best fixed depth in hindsight, and against no speculation, in virtual time.

The product's own engine, decoder, scheduler and policy run over a model that computes nothing: a step takes what a cost
curve says, on a clock that only they move, so the figures are the same on every machine.  Curves were measured on
SmolLM2-135M (``--measure`` prints a new one) or are made up, steep and flat.  What the drafter proposes is right or
wrong by dice that are thrown before anything runs, so every policy meets the very same luck.  Fixed depths are played
by a few compiled lines, which `compat_tests/engine/test_depth_policy.py` holds to the engine's own `FixedDepth`.

It knows nothing of text, and measures nothing but the choice of depths: what choosing takes is not counted.
"""

import argparse
import itertools
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numba
import numpy as np
import report

from helix_gateway.core.kv import KVGroup
from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.engine import decoder, step_costs
from helix_gateway.engine.depth import DRAFTING_S, AdaptiveDepth
from helix_gateway.engine.drafters.base import DraftTokens
from helix_gateway.engine.engine import Engine, EngineLimits
from helix_gateway.engine.step_costs import measure_costs
from helix_gateway.service.speculation import PROFILED_ROWS

LOADS = (1, 2, 4, 8, 16, 32, 64)
FIXED_DEPTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
MAX_DEPTH = 32
SEQUENCES_PER_PLACE, FEWEST_SEQUENCES = 2, 8
LENGTHS = (100, 300)
TARGETS = 31

MEASURED_ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128, 256)
THREADS = 2
"""Of a step; with ``OMP_NUM_THREADS=1`` a curve's processor time is shared out among so many."""
ENOUGH_OF_BEST, ENOUGH_OF_OFF = 0.95, 0.99
NEARLY_BEST = 0.985
"""Below this the picture says how much it is."""
CURVES_MS = {
    # Processor time of one thread on an EPYC with AVX-512, halved: OMP_NUM_THREADS=1 depth_policy.py --measure DTYPE
    "float32": {
        1: 13.8,
        4: 14.6,
        8: 14.8,
        10: 15.9,
        12: 18.2,
        14: 25.0,
        16: 27.6,
        20: 33.3,
        24: 39.0,
        32: 51.8,
        48: 71.5,
        64: 96.8,
        96: 136.0,
        128: 187.0,
        256: 375.0,
    },
    "bfloat16": {
        1: 7.98,
        2: 8.53,
        3: 8.87,
        4: 9.5,
        6: 11.5,
        8: 14.3,
        10: 17.2,
        12: 19.7,
        14: 22.9,
        16: 26.0,
        20: 32.2,
        24: 38.5,
        32: 50.9,
        48: 73.0,
        64: 99.2,
        96: 142.0,
        128: 192.0,
        256: 379.0,
    },
    # Each row as dear as the first, from the first: nothing pays.
    "steep": {1: 10.0, 4096: 40960.0},
    # Rows cost next to nothing, as on a large device.
    "flat": {1: 10.0, 128: 10.2, 1024: 16.0, 4096: 60.0},
    # Rows come in tiles of eight.
    "stairs": {1: 10.0, 8: 10.2, 9: 15.0, 16: 15.2, 17: 20.0, 24: 20.2, 25: 25.0, 32: 25.2, 33: 30.0, 64: 45.0},
}
CURVES_MS["busy float32"] = CURVES_MS["float32"]
"""The same on a machine where others are at work: see `busy`."""


# ---- what drafts meet


def acceptance(kind, number, length):
    """Mean chance [length] that a draft token of sequence ``number`` is right."""
    place = np.arange(length)
    if kind == "mixed":
        return np.full(length, 0.9 if number % 2 else 0.1)
    if kind == "rising":
        return np.where(place < length // 2, 0.1, 0.9)
    if kind == "falling":
        return np.where(place < length // 2, 0.9, 0.1)
    if kind == "switching":
        return np.where(place // 40 % 2 == number % 2, 0.1, 0.9)
    return np.full(length, {"never": 0.0, "low": 0.25, "half": 0.5, "high": 0.9, "copy": 0.99}[kind])


ACCEPTANCES = ("never", "low", "half", "high", "copy", "mixed", "rising", "falling", "switching")
CONFIDENCES = ("honest", "overconfident", "useless")
_SPREAD = 3.0
"""Of the chances of single tokens about their mean, as the weight of a beta distribution."""


@dataclass
class World:
    """What becomes of each draft token of each sequence, whoever asks.

    Args:
        right: bool [num_sequences, longest]: whether the token drafted for a place is right.
        confidences: float32, the same shape: what the drafter thinks of it.
        lengths: int64 [num_sequences]: output tokens.
    """

    right: np.ndarray
    confidences: np.ndarray
    lengths: np.ndarray


def make_world(kind, confidence, load, seed):
    dice = np.random.default_rng([seed, ACCEPTANCES.index(kind), load])
    count = max(FEWEST_SEQUENCES, SEQUENCES_PER_PLACE * load)
    lengths = dice.integers(*LENGTHS, count)
    means = np.array([acceptance(kind, number, LENGTHS[1]) for number in range(count)])
    chances = np.where(means > 0, dice.beta(_SPREAD * np.maximum(means, 1e-9), _SPREAD * (1 - means)), 0.0)
    right = dice.uniform(size=chances.shape) < chances
    confidences = {
        "honest": chances,
        "overconfident": 1 - (1 - chances) / 5,
        "useless": dice.uniform(0.3, 1.0, chances.shape),
    }[confidence]
    return World(right, np.clip(confidences, 0, 1).astype(np.float32), lengths)


# ---- the engine, on a clock of its own


class Clock:
    """Seconds that pass when somebody says so; what is seen of them may be off."""

    def __init__(self):
        self.passed_s = self.seen_s = 0.0

    def pass_time(self, seconds, seen=1.0):
        self.passed_s += seconds
        self.seen_s += seconds * seen

    def __call__(self):
        return self.seen_s


class Model:
    """`ModelRunner` whose next token is told by the place alone; a forward takes what the curve says."""

    kv_groups = (KVGroup("full", 64, None),)
    num_pages = 1024
    vocab_size = TARGETS + 1

    def __init__(self, curve, clock, noise):
        self._curve, self.clock, self._noise = curve, clock, noise

    def copy_pages(self, copies):
        pass

    def forward(self, batch):
        self.clock.pass_time(seconds_of(self._curve, len(batch.token_ids)), self._noise())

    def logprobs(self, logits, logits_index, token_ids, top):
        pass

    def sample(self, logits, rows):
        return (rows.position % TARGETS).astype(np.int32)


class Dice:
    """`Drafter` that proposes what the world has laid down, right or wrong."""

    def __init__(self, world, clock):
        self._world, self._clock = world, clock

    def propose(self, sequences, depths):
        self._clock.pass_time(DRAFTING_S * len(sequences))
        return [self._draft(sequence, depth) for sequence, depth in zip(sequences, depths, strict=True)]

    def _draft(self, sequence, depth):
        number, first = int(sequence.request.request_id), sequence.num_output_tokens
        right = self._world.right[number, first : first + depth]
        tokens = (len(sequence.token_ids) + np.arange(len(right))) % TARGETS
        tokens = np.where(right, tokens, TARGETS).astype(np.int32)
        return DraftTokens("dice", tokens, self._world.confidences[number, first : first + depth])

    def retire(self, sequence):
        pass


def points(curve_ms):
    """A curve as (rows, seconds), which goes on beyond its end as it was at its end."""
    rows = np.array(sorted(curve_ms), np.float64)
    seconds = np.array([curve_ms[int(count)] / 1e3 for count in rows])
    slope = (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2])
    return np.append(rows, 8192.0), np.append(seconds, seconds[-1] + slope * (8192.0 - rows[-1]))


def quiet():
    """What a step takes is what the curve says."""
    return 1.0


def seconds_of(curve, num_rows):
    return float(np.interp(num_rows, *curve))


def play_engine(world, curve, load, policy, noise=quiet):
    """Tokens and seconds until nobody waits any more: afterwards the load is another."""
    clock = Clock()
    limits = EngineLimits(max_model_len=1024, max_num_seqs=load, max_num_batched_tokens=16384, max_queue_len=10**6)
    with mock.patch.object(decoder, "perf_counter", clock):
        engine = Engine(Model(curve, clock, noise), limits, drafter=Dice(world, clock), depth_policy=policy)
        for number, length in enumerate(world.lengths):
            sampling = SamplingParams(max_tokens=int(length), temperature=0.0)
            engine.submit(Request(request_id=str(number), prompt_token_ids=[0], sampling=sampling))
        tokens = 0
        while engine.num_waiting or not tokens:
            tokens += sum(len(event.token_ids) for event in engine.step())
    return tokens, clock.passed_s


@numba.njit(cache=True)
def _play_fixed(right, lengths, load, depth, rows_at, seconds_at, drafting_s):
    at, places, following = np.zeros(len(lengths), np.int64), np.arange(load), load
    tokens, seconds = 0, 0.0
    while True:
        rows = 0
        for place in range(load):
            number = places[place]
            if at[number] == lengths[number]:
                if following == len(lengths):
                    continue
                number = places[place] = following
                following += 1
            drafted = min(depth, lengths[number] - at[number] - 1)
            rows += 1 + drafted
            seconds += drafting_s if drafted else 0.0
            taken = 1
            while taken <= drafted and right[number, at[number] + taken - 1]:
                taken += 1
            at[number] += taken
            tokens += taken
        seconds += np.interp(float(rows), rows_at, seconds_at)
        if following == len(lengths):
            return tokens, seconds


def play_fixed(world, curve, load, depth):
    """What `play_engine` gives with `FixedDepth`."""
    return _play_fixed(world.right, world.lengths, load, depth, *curve, DRAFTING_S)


# ---- cells


@dataclass(frozen=True)
class Cell:
    """One situation."""

    curve: str
    load: int
    acceptance: str
    confidence: str


def policy_for(curve):
    """The product's policy, which knows of the costs what `helix serve` measures at its start."""
    model = Model(curve, Clock(), quiet)
    with mock.patch.object(step_costs, "perf_counter", model.clock):
        return AdaptiveDepth(measure_costs(model, PROFILED_ROWS), max_depth=MAX_DEPTH)


def rate(played):
    """Tokens a second over several plays."""
    tokens, seconds = zip(*played, strict=True)
    return sum(tokens) / sum(seconds)


def busy(seed):
    """Steps seem to take a sixth more or less, and one in fifty twice as long.

    What is reckoned with is what they should have taken: whose steps are held up is luck, and no merit of a policy.
    """
    dice = np.random.default_rng(seed)
    return lambda: dice.lognormal(0.0, 0.15) * (2.0 if dice.uniform() < 0.02 else 1.0)


def measure(cell, seeds):
    curve = points(CURVES_MS[cell.curve])
    worlds = [make_world(cell.acceptance, cell.confidence, cell.load, seed) for seed in seeds]
    fixed = {depth: rate([play_fixed(world, curve, cell.load, depth) for world in worlds]) for depth in FIXED_DEPTHS}
    best = max(fixed, key=fixed.get)
    auto = rate(
        [
            play_engine(world, curve, cell.load, policy_for(curve), busy(seed) if "busy" in cell.curve else quiet)
            for seed, world in zip(seeds, worlds, strict=True)
        ]
    )
    return {
        "curve": cell.curve,
        "load": cell.load,
        "acceptance": cell.acceptance,
        "confidence": cell.confidence,
        "off": fixed[0],
        "best_depth": best,
        "best_fixed": fixed[best],
        "auto": auto,
        "over_best": auto / fixed[best],
        "over_off": auto / fixed[0],
    }


def label(row):
    return f"{row['acceptance']}, {row['confidence']}"


def plot(rows):
    """A square for each cell: green where the policy beats the best fixed depth, red, with its figure, where it falls short."""

    def draw(axes):
        across = list(dict.fromkeys((row["curve"], row["load"]) for row in rows))
        down = list(dict.fromkeys(map(label, rows)))
        squares = np.full((len(down), len(across)), np.nan)
        for row in rows:
            squares[down.index(label(row)), across.index((row["curve"], row["load"]))] = row["over_best"]
        image = axes.imshow(squares, cmap="RdYlGn", vmin=0.9, vmax=1.1, aspect="auto")
        axes.figure.colorbar(image, ax=axes, extend="both", pad=0.01, label="over the best fixed depth")
        for (y, x), value in np.ndenumerate(squares):
            if value < NEARLY_BEST:
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(across)), [str(load) for _, load in across], fontsize=8)
        axes.set_yticks(range(len(down)), down, fontsize=8)
        for name in dict.fromkeys(curve for curve, _ in across):
            first = next(x for x, (curve, _) in enumerate(across) if curve == name)
            axes.text(first - 0.4, -0.8, name, fontsize=10)
            axes.axvline(first - 0.5, color="black", linewidth=0.8)
        axes.set_xlabel("sequences at once")
        axes.set_title(
            "the policy's tokens a second over those of the best fixed depth in hindsight", pad=24, fontsize=11
        )

    return draw


def print_rows(rows):
    columns = ["costs", "sequences", "drafts are right", "confidence", "best fixed", "over it", "over off"]
    shown = ["curve", "load", "acceptance", "confidence", "best_depth", "over_best", "over_off"]
    rounded = [{**row, **{key: f"{row[key]:.3f}" for key in shown[-2:]}} for row in rows]
    report.print_table("The depth policy in virtual time", columns, [[row[key] for key in shown] for row in rounded])
    short = [row for row in rows if row["over_best"] < ENOUGH_OF_BEST or row["over_off"] < ENOUGH_OF_OFF]
    print(f"{len(rows)} cells; least over the best fixed depth {min(row['over_best'] for row in rows):.3f}", end=", ")
    print(f"over off {min(row['over_off'] for row in rows):.3f}; {len(short)} fall short")
    return short


def measure_curve(dtype):
    """Print what a step of the default model takes by rows, in processor time, so that others at work hardly count."""
    from helix_gateway.runtime.factory import load_runner
    from helix_gateway.runtime.model_source import resolve

    runner = load_runner(resolve(None), dtype=dtype, kv_cache_memory_bytes=1 << 30, max_tokens_in_use=10**6).runner
    with mock.patch.object(step_costs, "perf_counter", time.process_time):
        for rows in MEASURED_ROWS:
            step_costs._seconds(runner, rows)
            fastest_s = min(step_costs._seconds(runner, rows) for _ in range(7))
            print(f"{rows}: {1e3 * fastest_s / THREADS:.2f},", end=" ", flush=True)
    print()


def chosen(options):
    everything = itertools.product(CURVES_MS, LOADS, ACCEPTANCES, CONFIDENCES)
    wanted = [options.curve, options.load, options.acceptance, options.confidence]
    for values in everything:
        if all(not some or value in some for value, some in zip(values, wanted, strict=True)):
            yield Cell(*values)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", action="append", choices=list(CURVES_MS), help="each may be given several times")
    parser.add_argument("--load", action="append", type=int, choices=LOADS)
    parser.add_argument("--acceptance", action="append", choices=ACCEPTANCES)
    parser.add_argument("--confidence", action="append", choices=CONFIDENCES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--measure", metavar="DTYPE", help="print the cost curve of the default model, and no more")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    if options.measure:
        return measure_curve(options.measure)
    with ProcessPoolExecutor(options.processes) as pool:
        measured = pool.map(partial(measure, seeds=range(options.seeds)), cells := list(chosen(options)))
        rows = []
        with report.progress("cells", len(cells)) as advance:
            for row in measured:
                rows.append(row)
                advance(1)
    short = print_rows(rows)
    report.save("depth_policy", {"seeds": options.seeds, "cells": rows}, plot(rows), folder=options.out, size=(16, 8))
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
