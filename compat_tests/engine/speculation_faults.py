"""Known bugs of speculation, each of which some engine has had, to be put in on purpose: a test that passes with one of
them shows nothing.

Each takes pytest's ``monkeypatch`` and breaks the engine for the rest of the test.
"""

from dataclasses import replace

import numpy as np

from helix_gateway.engine import decoder
from helix_gateway.engine.token_edits import TokenEdits


def noise_of_the_wrong_position(monkeypatch):
    """Every row of a window gets the noise of its first."""

    def change(rows, first, width):
        rows.position[first : first + width] = rows.position[first]

    _change_windows(monkeypatch, change)


def bonus_from_the_wrong_row(monkeypatch):
    """The token after the last draft is drawn from the logits before it."""

    def change(rows, first, width):
        last = first + width - 1
        rows.logits_index[last] = rows.logits_index[max(first, last - 1)]

    _change_windows(monkeypatch, change)


def penalties_not_advanced(monkeypatch):
    """Penalties, bans and bad words are those of the window's first position throughout."""
    monkeypatch.setattr(TokenEdits, "along", lambda edits, draft_tokens: [edits.current()] * (1 + len(draft_tokens)))


def drafts_of_the_likely_believed(monkeypatch):
    """A draft is accepted where the target chose a token of nearly the same id, as if that were close enough."""
    verify = decoder.verify

    def lenient(sampled, drafts):
        nudged = [
            [draft if abs(draft - choice) <= 1 else choice for choice, draft in zip(choices, draft_tokens)]
            + list(choices[len(draft_tokens) :])
            for choices, draft_tokens in zip(sampled, drafts, strict=True)
        ]
        return verify(nudged, drafts)

    monkeypatch.setattr(decoder, "verify", lenient)


def _change_windows(monkeypatch, change):
    """Let ``change(rows, first, width)`` have each window's rows before they are sampled."""
    build = decoder.build_sampling_rows

    def broken(windows, *arguments):
        rows = build(windows, *arguments)
        rows = replace(rows, position=np.array(rows.position), logits_index=np.array(rows.logits_index))
        first = 0
        for window in windows:
            if window.sampled_rows:
                change(rows, first, len(window.sampled_rows))
                first += len(window.sampled_rows)
        return rows

    monkeypatch.setattr(decoder, "build_sampling_rows", broken)


FAULTS = {
    "noise of the wrong position": noise_of_the_wrong_position,
    "penalties not advanced": penalties_not_advanced,
    "bonus from the wrong row": bonus_from_the_wrong_row,
    "drafts believed that are nearly right": drafts_of_the_likely_believed,
}
