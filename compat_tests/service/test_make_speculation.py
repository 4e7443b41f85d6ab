"""Who drafts where the device has no room to measure what drafting costs, and what is remembered of such measurements."""

from typing import ClassVar

import pytest

from compat_tests.engine.toy import ONE_GROUP, VOCAB, ToyRunner
from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.engine import step_costs
from helix_gateway.engine.drafters.none import NoDrafter
from helix_gateway.engine.drafters.suffix import SuffixDrafter
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.runtime.remembered import Remembered
from helix_gateway.service.settings import EngineSettings
from helix_gateway.service.speculation import DraftModel, make_speculation


class Full(ToyRunner):
    def forward(self, batch):
        raise OutOfMemoryError("no room")


def speculation(target_kind, draft_kind, **settings):
    draft_model = DraftModel(draft_kind(ONE_GROUP, 20, VOCAB), 100, None)
    return make_speculation(
        EngineSettings(model_path="target", **settings),
        target_kind(ONE_GROUP, 20),
        4,
        cache=PagedKVCache(ONE_GROUP, 20),
        draft_model=draft_model,
    )


def test_with_room_for_both_both_draft(capsys):
    made = speculation(ToyRunner, ToyRunner)
    assert isinstance(made.drafter, SuffixDrafter)
    assert made.costly_drafter is not None
    assert "no_memory" not in capsys.readouterr().out


def test_a_draft_model_without_room_leaves_the_free_drafter_at_work_and_is_told_of(capsys):
    made = speculation(ToyRunner, Full)
    assert isinstance(made.drafter, SuffixDrafter)
    assert made.costly_drafter is None
    told = capsys.readouterr().out
    assert told.count("no_memory_to_measure_speculation") == 1
    assert "draft model" in told


def test_a_model_without_room_goes_without_drafts_and_that_is_told(capsys):
    made = speculation(Full, ToyRunner)
    assert isinstance(made.drafter, NoDrafter)
    assert capsys.readouterr().out.count("no_memory_to_measure_speculation") == 1


class Counted(ToyRunner):
    """A toy whose steps take some time a row, and are counted."""

    passed_s = 0.0
    seconds_a_row = 0.001
    seconds_a_step = 0.0
    held_up_s: ClassVar = {}
    """By numbers of rows."""

    def forward(self, batch):
        rows = len(batch.token_ids)
        type(self).passed_s += self.seconds_a_step + self.seconds_a_row * rows + self.held_up_s.get(rows, 0.0)
        return super().forward(batch)


def start(remembered, kind=Counted):
    """The costs that a start arrives at, and the numbers of rows of its steps."""
    runner = kind(ONE_GROUP, 20)
    made = make_speculation(EngineSettings(model_path="target"), runner, 64, remembered=remembered)
    return made.depth_policy._costs, [len(batch.token_ids) for batch in runner.batches]


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(step_costs, "perf_counter", lambda: Counted.passed_s)


def test_a_second_start_takes_the_known_costs_brought_to_the_machines_present_speed(clock, monkeypatch, tmp_path):
    measured, rows = start(Remembered({}, tmp_path))
    assert max(rows) > 32
    monkeypatch.setattr(Counted, "seconds_a_row", 0.002)
    rescaled, rows = start(Remembered({}, tmp_path))
    assert {1, 8} < set(rows)
    assert len(set(rows)) == 3
    assert rescaled.seconds_for(48) == pytest.approx(2 * measured.seconds_for(48))


def test_costs_of_another_shape_than_the_known_ones_are_measured_anew(clock, monkeypatch, tmp_path):
    start(Remembered({}, tmp_path))
    monkeypatch.setattr(Counted, "seconds_a_step", 0.1)
    costs, rows = start(Remembered({}, tmp_path))
    assert max(rows) > 32
    assert costs.seconds_for(48) == pytest.approx(0.148)
    _, rows = start(Remembered({}, tmp_path))
    assert {1, 8} < set(rows)
    assert len(set(rows)) == 3


def test_one_step_that_was_held_up_while_it_was_measured_is_found_out(clock, monkeypatch, tmp_path):
    monkeypatch.setattr(Counted, "held_up_s", {64: 1.0})
    held_up, _ = start(Remembered({}, tmp_path))
    assert held_up.seconds_for(64) > 1
    monkeypatch.setattr(Counted, "held_up_s", {})
    for _ in range(40):  # each start looks at another one
        costs, _ = start(Remembered({}, tmp_path))
    assert costs.seconds_for(64) == pytest.approx(0.064)
