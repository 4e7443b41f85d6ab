"""What came of drafts is counted by drafter and by place, window by window."""

from helix_gateway.core.stats import DraftCounts
from helix_gateway.engine.draft_ledger import DraftLedger


def test_each_window_counts_at_every_place_up_to_where_it_was_right():
    ledger = DraftLedger()
    for source, drafted, accepted in [
        ("suffix", 4, 2),
        ("suffix", 3, 0),
        ("model", 2, 2),
        ("suffix", 3, 3),
        (None, 0, 0),
    ]:
        ledger.count(source, drafted, accepted)
    assert ledger.counts() == {
        "suffix": DraftCounts(
            num_drafts=3, num_draft_tokens=10, num_accepted_tokens=5, accepted_per_position=[2, 2, 1]
        ),
        "model": DraftCounts(num_drafts=1, num_draft_tokens=2, num_accepted_tokens=2, accepted_per_position=[1, 1]),
    }
    assert ledger.depths() == [1, 0, 1, 2, 1]


def test_who_was_never_right_has_no_place():
    ledger = DraftLedger()
    ledger.count("store", 5, 0)
    assert ledger.counts()["store"].accepted_per_position == []
