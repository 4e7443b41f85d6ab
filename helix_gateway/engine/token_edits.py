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

_ROOM = 16
"""Slots that a sequence has for tokens of its output before they are doubled."""
_LEAST_SCALE = 1e-30
"""Logits are divided by a scale in float32: a smaller one would make them infinite, and the least there are zero."""


@dataclass(frozen=True, slots=True)
class RowEdits:
    """The edits of one row; arrays of one length."""

    token_ids: Int32s
    scale: Float32s
    shift: Float32s


def _no_edits() -> LogitEdits:
    ids, numbers = np.empty(0, np.int32), np.empty(0, np.float32)
    return LogitEdits(rows=ids, token_ids=ids, scale=numbers, shift=numbers)


NO_EDITS = _no_edits()
"""Of a batch in which nobody's logits are changed."""


def join_edits(rows: Sequence[RowEdits | None]) -> LogitEdits:
    """The edits of a batch, from those of its rows (None: the row has none)."""
    present = [(index, edits) for index, edits in enumerate(rows) if edits is not None]
    if not present:
        return NO_EDITS
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
        self._penalty = max(params.repetition_penalty, _LEAST_SCALE)
        self._slots: dict[int, int] = {}
        self._output: list[int] = []
        self._stop_ids = sorted(stop_ids) if params.min_tokens else []
        known = {*params.logit_bias, *self._stop_ids, *(word[-1] for word in params.bad_words)}
        if params.repetition_penalty != 1.0:
            known.update(prompt)
        ids = sorted(known)
        self._slots = {token: slot for slot, token in enumerate(ids)}
        # Columns with room for tokens to come; what lies beyond the slots in use is as a new slot has it.
        self._ids = np.array(ids + [0] * _ROOM, np.int32)
        self._bias = np.array([params.logit_bias.get(token, 0.0) for token in ids] + [0.0] * _ROOM, np.float32)
        self._counts = np.zeros(len(ids) + _ROOM, np.int32)
        self._scale = np.ones(len(ids) + _ROOM, np.float32)
        if params.repetition_penalty != 1.0:
            self._scale[[self._slots[token] for token in set(prompt)]] = self._penalty
        self._penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        self._bans = bool(self._stop_ids or params.bad_words)
        self.ever_any = self._penalised or bool(ids)
        """Whether any token of the sequence may see its logits changed."""

    def advance(self, token_id: int) -> None:
        """Take one token of the output."""
        self._output.append(token_id)
        if not self._penalised:
            return
        slot = self._slots.get(token_id)
        if slot is None:
            slot = self._new_slot(token_id)
        self._counts[slot] += 1
        self._scale[slot] = self._penalty

    def _new_slot(self, token_id: int) -> int:
        slot = self._slots[token_id] = len(self._slots)
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._bias = np.concatenate([self._bias, np.zeros_like(self._bias)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._scale = np.concatenate([self._scale, np.ones_like(self._scale)])
        self._ids[slot] = token_id
        return slot

    def along(self, draft_tokens: Sequence[int]) -> list[RowEdits | None]:
        """The edits at each position of a verify window: none, one, … all of the drafts taken as output.

        Returns:
            ``1 + len(draft_tokens)`` edits; the state is as before.
        """
        rows = [self.current()]
        if not self._penalised and not self._bans:
            return rows * (1 + len(draft_tokens))
        if draft_tokens:
            size, counts, scale = len(self._slots), self._counts.copy(), self._scale.copy()
            for token in draft_tokens:
                self.advance(token)
                rows.append(self.current())
            for token in self._ids[size : len(self._slots)].tolist():
                del self._slots[token]
            self._counts[: len(counts)], self._counts[len(counts) :] = counts, 0
            self._scale[: len(scale)], self._scale[len(scale) :] = scale, 1
            del self._output[-len(draft_tokens) :]
        return rows

    def current(self) -> RowEdits | None:
        """The edits of the next token's logits; None where there are none."""
        size = len(self._slots)
        if not size:
            return None
        params, counts, shift = self._params, self._counts[:size], self._bias[:size].copy()
        if params.presence_penalty:
            shift -= np.float32(params.presence_penalty) * (counts > 0)
        if params.frequency_penalty:
            shift -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        if self._bans:
            shift[[self._slots[token] for token in self._banned()]] = -np.inf
        return RowEdits(self._ids[:size].copy(), self._scale[:size].copy(), shift)

    def _banned(self) -> Iterator[int]:
        if len(self._output) < self._params.min_tokens:
            yield from self._stop_ids
        for *before, last in self._params.bad_words:
            if not before or self._output[-len(before) :] == before:
                yield last
