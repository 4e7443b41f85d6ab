"""The depth policy of the product, in virtual time, against the best fixed depth in hindsight."""

import importlib.util
import sys
from pathlib import Path

import pytest

from helix_gateway.engine.depth import FixedDepth

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SEEDS = range(2)
"""As many as the benchmark plays unless told otherwise: dice alone make a run several percent worse than the mean."""
LEAST_OF_BEST = 0.93
"""What every run reaches by itself.  Of ten seeds of the cell that is worst by one (a busy machine, 4 streams, drafts
that copy, useless confidence) the least is 0.943 and the mean 0.974."""


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("depth_policy", BENCHMARKS / "depth_policy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["depth_policy"] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


@pytest.mark.parametrize("load", [1, 6])
@pytest.mark.parametrize("depth", [0, 1, 3, 8])
def test_fixed_depths_are_played_as_the_engine_plays_them(bench, load, depth):
    world = bench.make_world("mixed", "honest", load, 5)
    curve = bench.points(bench.CURVES_MS["float32"])
    tokens, seconds = bench.play_engine(world, curve, load, FixedDepth(depth))
    assert (tokens, pytest.approx(seconds, rel=1e-9)) == bench.play_fixed(world, curve, load, depth)


@pytest.mark.parametrize("acceptance", ["never", "half", "copy", "rising", "switching"])
@pytest.mark.parametrize("curve, load", [("float32", 1), ("float32", 8), ("stairs", 8), ("busy float32", 4)])
@pytest.mark.parametrize("confidence", ["honest", "useless"])
def test_the_policy_is_about_as_good_as_the_best_fixed_depth_and_not_worse_than_none(
    bench, curve, load, acceptance, confidence
):
    cell = bench.Cell(curve, load, acceptance, confidence)
    assert bench.measure(cell, seeds=SEEDS)["over_best"] >= bench.ENOUGH_OF_BEST
    for alone in (bench.measure(cell, seeds=[seed]) for seed in SEEDS):
        assert alone["over_best"] >= LEAST_OF_BEST
        assert alone["over_off"] >= bench.ENOUGH_OF_OFF


def test_the_same_seed_gives_the_same_figures(bench):
    cell = bench.Cell("bfloat16", 2, "mixed", "overconfident")
    assert bench.measure(cell, seeds=[3]) == bench.measure(cell, seeds=[3])


def test_where_nothing_can_pay_nothing_is_drafted(bench):
    cell = bench.measure(bench.Cell("steep", 8, "copy", "honest"), seeds=[0])
    assert cell["auto"] == pytest.approx(cell["off"], rel=1e-9)
