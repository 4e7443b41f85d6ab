"""Penalties, bias and bans of one sequence, as sparse edits of its next token's logits.

All of them are of one form (`core.step.LogitEdits`): a scale and a shift for some token ids.  The state follows
the sequence's tokens one by one, so along a verify window each position sees exactly the tokens before it.
Knows nothing about logits themselves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from helix_gateway.core.request import SamplingParams
from helix_gateway.core.step import Float32s, Int32s, LogitEdits


@dataclass(frozen=True, slots=True)
class RowEdits:
    """The edits of one row; arrays of one length."""

    token_ids: Int32s
    scale: Float32s
    shift: Float32s


def join_edits(rows: Sequence[RowEdits | None]) -> LogitEdits:
    """The edits of a batch, from those of its rows (None: the row has none)."""
    present = [(index, edits) for index, edits in enumerate(rows) if edits is not None]
    if not present:
        empty = np.empty(0, np.int32)
        return LogitEdits(rows=empty, token_ids=empty, scale=np.empty(0, np.float32), shift=np.empty(0, np.float32))
    return LogitEdits(
        rows=np.repeat(
            np.array([index for index, _ in present], np.int32), [len(edits.token_ids) for _, edits in present]
        ),
        token_ids=np.concatenate([edits.token_ids for _, edits in present]),
        scale=np.concatenate([edits.scale for _, edits in present]),
        shift=np.concatenate([edits.shift for _, edits in present]),
    )


class TokenEdits:
    """What a sequence's options change at its next position.

    Args:
        params: the options.
        prompt: the prompt's token ids, which the repetition penalty counts as seen.
        stop_ids: tokens that would end the sequence, banned until ``min_tokens`` are out.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], stop_ids: frozenset[int]) -> None:
        self._params = params
        self._slots: dict[int, int] = {}
        self._output: list[int] = []
        self._stop_ids = sorted(stop_ids) if params.min_tokens else []
        known = {*params.logit_bias, *self._stop_ids, *(word[-1] for word in params.bad_words)}
        if params.repetition_penalty != 1.0:
            known.update(prompt)
        self._ids = np.array(sorted(known), np.int32)
        self._slots = {int(token): slot for slot, token in enumerate(self._ids)}
        self._bias = np.array([params.logit_bias.get(int(token), 0.0) for token in self._ids], np.float32)
        self._counts = np.zeros(len(self._ids), np.int32)
        self._scale = np.ones(len(self._ids), np.float32)
        if params.repetition_penalty != 1.0:
            self._scale[[self._slots[token] for token in set(prompt)]] = params.repetition_penalty
        self._penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)

    def advance(self, token_id: int) -> None:
        """Take one token of the output."""
        self._output.append(token_id)
        if not self._penalised:
            return
        slot = self._slots.get(token_id)
        if slot is None:
            slot = self._append_slot(token_id)
        self._counts[slot] += 1
        self._scale[slot] = self._params.repetition_penalty

    def _append_slot(self, token_id: int) -> int:
        slot = self._slots[token_id] = len(self._ids)
        self._ids = np.append(self._ids, np.int32(token_id))
        self._bias = np.append(self._bias, np.float32(0))
        self._counts = np.append(self._counts, np.int32(0))
        self._scale = np.append(self._scale, np.float32(1))
        return slot

    def along(self, draft_tokens: Sequence[int]) -> list[RowEdits | None]:
        """The edits at each position of a verify window: none, one, … all of the drafts taken as output.

        Returns:
            ``1 + len(draft_tokens)`` edits; the state is as before.
        """
        rows = [self.current()]
        if draft_tokens:
            saved = self._ids, self._bias, self._counts.copy(), self._scale.copy(), dict(self._slots)
            for token in draft_tokens:
                self.advance(token)
                rows.append(self.current())
            self._ids, self._bias, self._counts, self._scale, self._slots = saved
            del self._output[-len(draft_tokens) :]
        return rows

    def current(self) -> RowEdits | None:
        """The edits of the next token's logits; None where there are none."""
        if not len(self._ids):
            return None
        params = self._params
        shift = self._bias - np.float32(params.presence_penalty) * (self._counts > 0)
        shift -= np.float32(params.frequency_penalty) * self._counts
        banned = [self._slots[token] for token in self._banned()]
        shift[banned] = -np.inf
        return RowEdits(self._ids, self._scale.copy(), shift.astype(np.float32))

    def _banned(self) -> Iterator[int]:
        if len(self._output) < self._params.min_tokens:
            yield from self._stop_ids
        for *before, last in self._params.bad_words:
            if not before or self._output[-len(before) :] == before:
                yield last
