"""What a server of a tiny model goes through under random visitors, disconnects and engine kills, for as long as you like.

    python benchmarks/soak.py --minutes 60

The visitors are those of `compat_tests/soak`.  Prints what they saw, writes it as JSON, and draws memory over time;
exits with 1 where somebody had a complaint, memory grew or a block was lost.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

import report
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compat_tests.serving import start_server, stop_server  # noqa: E402
from compat_tests.soak.asks import save_tiny_model  # noqa: E402
from compat_tests.soak.soak import Soak  # noqa: E402

MOST_GROWTH = 0.02
"""Of resident memory over the last half."""


async def run(soak, seconds):
    """The soak, with a bar."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[count]}")
    with Progress(*columns) as bar:
        task = bar.add_task("Soaking", total=seconds, count="")
        running = asyncio.create_task(soak.run())
        while not running.done():
            await asyncio.wait({running}, timeout=1.0)
            seen = f"{soak.report.requests} requests, {len(soak.report.complaints)} complaints"
            bar.update(task, completed=soak.elapsed_s(), count=seen)
    return await running


def draw(axes, seen):
    """Memory of both processes over time, and the kills."""
    minutes = [moment.at_s / 60 for moment in seen.memory]
    for name in ("engine", "gateway"):
        axes.plot(minutes, [getattr(moment, f"{name}_bytes") / 2**20 for moment in seen.memory], label=name)
    for number, kill in enumerate(seen.kills):
        axes.axvline(kill / 60, color="grey", linestyle=":", label=None if number else "engine killed")
    axes.set(
        xlabel="minutes", ylabel="resident memory, MiB", title=f"{seen.requests:,} requests, random faults", ylim=0
    )
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--requests", type=int, help="stop after so many")
    parser.add_argument("--visitors", type=int, default=16, help="at once")
    parser.add_argument("--kills", type=int, default=5, help="in the first half, evenly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for the JSON and the picture")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder))
        server = start_server(model, "--kv-cache-memory", "1MiB", "--log-level", "warning", timeout_s=600)
        try:
            soak = Soak(
                server,
                seconds=seconds,
                num_requests=options.requests,
                visitors=options.visitors,
                kill_at=[0.5 * (number + 1) / (options.kills + 1) for number in range(options.kills)],
                seed=options.seed,
            )
            seen = asyncio.run(run(soak, seconds))
        finally:
            stop_server(server)
    growth = {name: seen.growth(name) for name in ("gateway", "engine")}
    rows = [[outcome, count] for outcome, count in seen.outcomes.most_common()]
    report.print_table(f"{seen.requests} requests in {seen.seconds:.0f} s", ["outcome", "requests"], rows)
    print("Growth over the last half:", {name: f"{share:+.2%}" for name, share in growth.items()})
    print("Answers compared with an earlier one:", seen.compared)
    print("Blocks referenced at the end:", seen.blocks_referenced)
    for complaint in seen.complaints:
        print("complaint:", complaint)
    report.save(
        "soak",
        {
            "seconds": seen.seconds,
            "requests": seen.requests,
            "outcomes": dict(seen.outcomes.most_common()),
            "visitors": dict(seen.moods.most_common()),
            "engine_kills_s": seen.kills,
            "complaints": seen.complaints,
            "answers_compared": seen.compared,
            "blocks_referenced_at_the_end": seen.blocks_referenced,
            "growth_over_the_last_half": growth,
            "memory": [
                {"s": moment.at_s, "gateway_bytes": moment.gateway_bytes, "engine_bytes": moment.engine_bytes}
                for moment in seen.memory
            ],
        },
        lambda axes: draw(axes, seen),
        folder=options.output,
    )
    fine = not seen.complaints and seen.blocks_referenced == 0 and max(growth.values()) <= MOST_GROWTH
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()
