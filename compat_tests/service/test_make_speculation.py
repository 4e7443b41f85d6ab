"""Who drafts where the device has no room to measure what drafting costs."""

from compat_tests.engine.toy import ONE_GROUP, VOCAB, ToyRunner
from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.engine.drafters.none import NoDrafter
from helix_gateway.engine.drafters.suffix import SuffixDrafter
from helix_gateway.engine.kv_cache import PagedKVCache
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
