"""How many draft tokens a sequence gets at a step.

A policy first bounds what is drafted, from what is known before (the scheduler reserves room for as much), and then
chooses how much of the drafts is verified.  It sees sequences and confidences, never what tokens mean.
"""

import math
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numba
import numpy as np

from helix_gateway.core.step import Int32s
from helix_gateway.engine.acceptance import AcceptanceModel
from helix_gateway.engine.drafters.base import DraftTokens
from helix_gateway.engine.sequence import Sequence, SequenceKey
from helix_gateway.engine.step_costs import StepCosts, read_off

WORTH_IT = 1.02
"""Speculation must promise this much more: costs are estimates, and the plain step is known."""
_WORTH_ITS_ROWS = 1.25
"""Where drafts bring so many times what the time of their rows would bring without them, they are worth it though they
are few among many:"""
_FEW = 0.25
"""so much of what else they must promise is then enough."""
_TRIAL = 0.25
"""Of a plain step's time, what drafts of which nothing is known yet take, whatever they promise, to find out in a few
steps: with a tenth, a source that is always right was found out too late for 4 % (docs/log.md)."""
_LONGEST_TRIAL = 1.0
"""Of a plain step's time, what all of them together take at most, much as they promise: whoever drafts from a source
that is too sure is wrong at once."""
_PROMISES_PRIOR = 8.0
"""Tokens."""
_PROMISES_KEPT = 0.97
"""Of what is known of them, with each draft that is verified, and each step at which none is."""
_LEAST_BELIEVED = 0.9
"""Share of the chances: what is farther off is for the acceptance model to find out."""
DRAFTING_S = 30e-6
"""What proposing, judging and learning take for one sequence, before it was seen (docs/log.md)."""
_DRAFTING_RATE = 0.05
_DRAFTING_MOST = 2.0
"""Times what is believed of it; more is a step that was held up."""
_TRIES = 4
"""Drafts in a row of which nothing is worth verifying, after which they are likely in vain; fewer where little can be
won."""
_VAIN_SHARE = 0.005
"""Of a step's time, most that goes to drafts that are likely in vain."""
_VAIN_SHARE_OF_GAIN = 0.006
"""And most for all that could be won, if drafts were right throughout, as a share of plain decoding."""
_LONGEST_PERIOD = 64
_READING_S = 0.5e-6
"""What a token takes that a drafter has not seen yet (docs/log.md)."""
_LUCK = 0.1
"""Share of what could be won that a sequence is believed to win of which nothing is known."""
ANSWER_TOKENS = 64
"""Tokens that an answer of unknown length is believed to have."""
_STEPS_ALIKE = 16
"""Steps for which it is believed that costs have changed too little to ask again whether any draft could pay."""
_REACH_MARGIN = 4
_REACH_TIMES = 3
"""Drafts are asked for so much longer than they lately proved right: lengths scatter, and a long one is worth most."""


class DepthPolicy(Protocol):
    """Chooses depths."""

    def most(self, sequence: Sequence, num_decodes: int) -> int:
        """Most draft tokens that could be worth verifying for the sequence, in a step of so many decodes."""

    def choose(self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens], num_decodes: int) -> list[int]:
        """How much of each draft is verified.

        Args:
            sequences, drafts: those that have a draft.
            num_decodes: sequences that get a token in this step, drafted for or not.
        """

    def excuse(self, sequence: Sequence) -> None:
        """Hear that a drafter only read of the sequence in this step: what its drafts are worth, that does not tell."""

    def learn(self, sequence: Sequence, draft: DraftTokens, choices: Int32s) -> None:
        """Hear what a sequence got where a draft had been proposed, verified or not."""

    def observe(self, num_rows: int, seconds: float) -> None:
        """Hear how long a step of decodes and verify windows took."""

    def observe_drafting(self, num_sequences: int, seconds: float) -> None:
        """Hear how long drafts from what is free took so many sequences, from proposing to learning."""

    def retire(self, sequence: Sequence) -> None:
        """Forget a sequence, which has ended."""


class FixedDepth:
    """The same depth for every sequence at every step.

    Args:
        depth: draft tokens a step.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def most(self, sequence: Sequence, num_decodes: int) -> int:
        """See `DepthPolicy`."""
        return self._depth

    def choose(self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens], num_decodes: int) -> list[int]:
        """All of it."""
        return [len(draft.token_ids) for draft in drafts]

    def excuse(self, sequence: Sequence) -> None:
        """Nothing is held against anybody."""

    def learn(self, sequence: Sequence, draft: DraftTokens, choices: Int32s) -> None:
        """Nothing changes it."""

    def observe(self, num_rows: int, seconds: float) -> None:
        """Nothing changes it."""

    def observe_drafting(self, num_sequences: int, seconds: float) -> None:
        """Nothing changes it."""

    def retire(self, sequence: Sequence) -> None:
        """Nothing is kept of a sequence."""


class AdaptiveDepth:
    """The depths that bring the most tokens a second over the whole batch.

    A draft token is worth the chance that it is accepted (`AcceptanceModel`), and costs what one row more costs
    (`StepCosts`).  Chances fall along a draft, so for any number of rows the best are the likeliest tokens of all
    drafts, and the best number is found by trying each: the choice is the optimum, for any costs.

    Args:
        costs: of a step, by rows.
        max_depth: most draft tokens a sequence gets at a step.
        min_depth: verified at least, where a draft has as many; for those who test.
        acceptance: what is learned, where others go by it too; None: one of its own.
    """

    def __init__(
        self, costs: StepCosts, *, max_depth: int, min_depth: int = 0, acceptance: AcceptanceModel | None = None
    ) -> None:
        self._costs = costs
        self._max_depth = max_depth
        self._min_depth = min_depth
        self._acceptance = acceptance or AcceptanceModel()
        self._prospects: dict[int, _Prospect] = {}
        """By number of decodes, as costs were lately: they are asked for each sequence of a step."""
        self._observed = 0
        self._step = 0
        self._asked: set[SequenceKey] = set()
        """Who was asked about in this step; the next begins with the first who is asked about again."""
        self._drafting_s = DRAFTING_S
        self._patience: dict[SequenceKey, _Patience] = {}
        self._promises: dict[SequenceKey, float] = {}
        """Draft tokens that are being verified and were expected to be accepted."""
        self._promised = self._brought = _PROMISES_PRIOR
        """The same in the past, and how many were.  What looks best is, more often than not, what was overestimated."""

    def most(self, sequence: Sequence, num_decodes: int) -> int:
        """More than lately proved right, but no more than could pay if it were right throughout."""
        if self._min_depth:
            return self._max_depth
        if sequence.key in self._asked:
            self._step += 1
            self._asked.clear()
        self._asked.add(sequence.key)
        prospect = self._prospects.get(num_decodes)
        if prospect is None:
            prospect = self._prospects[num_decodes] = self._prospect(max(1, num_decodes))
        if not prospect.deepest or not self._is_worth_asking(sequence, prospect):
            return 0
        return min(prospect.deepest, _REACH_MARGIN + int(_REACH_TIMES * self._acceptance.reach(sequence.key)))

    def _is_worth_asking(self, sequence: Sequence, prospect: "_Prospect") -> bool:
        patience = self._patience.get(sequence.key)
        if patience is None:
            if not sequence.request.prediction_token_ids and not self._is_worth_reading(sequence, prospect):
                return False
            patience = self._patience[sequence.key] = self._newcomers_patience(prospect)
        return patience.is_turn(prospect, self._step)

    def _newcomers_patience(self, prospect: "_Prospect") -> "_Patience":
        """As many tries as whoever has most left, and one at least.

        Where drafts are in vain for all who are there, they likely are for another too.
        """
        fruitless = min((patience.fruitless for patience in self._patience.values()), default=0)
        return _Patience(fruitless=min(fruitless, prospect.tries - 1))

    def _is_worth_reading(self, sequence: Sequence, prospect: "_Prospect") -> bool:
        """Whether drafters should read a sequence at all, for what may come of it."""
        tokens = sequence.request.sampling.max_tokens
        left = ANSWER_TOKENS if tokens is None else min(ANSWER_TOKENS, tokens - sequence.num_output_tokens)
        reading_s = _READING_S * len(sequence.token_ids) + prospect.tries * self._drafting_s
        return _LUCK * prospect.saved_s * left > reading_s

    def _prospect(self, num_decodes: int) -> "_Prospect":
        rows = np.arange(num_decodes, num_decodes * (1 + self._max_depth) + 1)
        seconds = np.interp(rows, self._costs.rows, self._costs.seconds)
        rates = rows / seconds
        gain = float(rates.max() / rates[0]) - 1.0
        if gain <= WORTH_IT - 1.0:
            return _NOTHING_TO_WIN
        vain_s = min(_VAIN_SHARE, _VAIN_SHARE_OF_GAIN * gain) * float(seconds[0])
        return _Prospect(
            deepest=-(-int(rates.argmax()) // num_decodes),
            saved_s=float(1.0 / rates[0] - 1.0 / rates.max()),
            period=min(_LONGEST_PERIOD, math.ceil(num_decodes * self._drafting_s / vain_s)),
            tries=1 + int((_TRIES - 1) * min(1.0, gain)),
        )

    def choose(self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens], num_decodes: int) -> list[int]:
        """See `DepthPolicy`."""
        chances = self._acceptance.probabilities([sequence.key for sequence in sequences], drafts)
        believed = chances * min(1.0, max(_LEAST_BELIEVED, self._brought / self._promised))
        unknown = np.array([not self._acceptance.is_known(draft.source) for draft in drafts], bool)
        most_unknown = self._rows_within(_LONGEST_TRIAL, num_decodes, num_decodes) if unknown.any() else 0
        costs = self._costs
        depths = _best_depths(believed, num_decodes, costs.rows, costs.seconds, WORTH_IT, unknown, most_unknown)
        for sequence, depth, promise in zip(sequences, depths, _promises(chances, depths), strict=True):
            if depth:
                self._promises[sequence.key] = float(promise)
                self._patience.setdefault(sequence.key, _Patience()).fruitless = 0
        if not depths.any():  # what is not tried is not held against drafts for ever
            self._promised += (1 - _PROMISES_KEPT) * (_PROMISES_PRIOR - self._promised)
            self._brought += (1 - _PROMISES_KEPT) * (_PROMISES_PRIOR - self._brought)
        if unknown.any():
            tried = self._rows_within(_TRIAL, num_decodes, num_decodes + int(depths[~unknown].sum()))
            depths[unknown] = np.maximum(depths[unknown], _likeliest(believed[unknown], min(tried, most_unknown)))
        floors = [min(self._min_depth, len(draft.token_ids)) for draft in drafts]
        return [max(int(depth), floor) for depth, floor in zip(depths, floors, strict=True)]

    def _rows_within(self, share: float, num_decodes: int, num_rows: int) -> int:
        """How many rows may be added to ``num_rows`` until they take such a share of the plain step's time."""
        rows = np.arange(num_rows, num_rows + num_decodes * self._max_depth + 1)
        seconds = np.interp(rows, self._costs.rows, self._costs.seconds)
        plain_s = float(np.interp(num_decodes, self._costs.rows, self._costs.seconds))
        return int(np.count_nonzero(seconds <= seconds[0] + share * plain_s)) - 1

    def excuse(self, sequence: Sequence) -> None:
        """See `DepthPolicy`."""
        self._patience.setdefault(sequence.key, _Patience()).excuse()

    def learn(self, sequence: Sequence, draft: DraftTokens, choices: Int32s) -> None:
        """See `DepthPolicy`."""
        self._acceptance.learn(sequence.key, draft, choices)
        promised = self._promises.pop(sequence.key, None)
        if promised is not None:
            self._promised = self._promised * _PROMISES_KEPT + promised
            self._brought = self._brought * _PROMISES_KEPT + len(choices) - 1

    def observe(self, num_rows: int, seconds: float) -> None:
        """See `DepthPolicy`."""
        self._costs.observe(num_rows, seconds)
        self._observed += 1
        if self._observed % _STEPS_ALIKE == 0:
            self._prospects.clear()

    def observe_drafting(self, num_sequences: int, seconds: float) -> None:
        """See `DepthPolicy`."""
        seen = min(seconds / num_sequences, _DRAFTING_MOST * self._drafting_s)
        self._drafting_s += _DRAFTING_RATE * (seen - self._drafting_s)

    def retire(self, sequence: Sequence) -> None:
        """See `DepthPolicy`."""
        self._acceptance.forget(sequence.key)
        self._asked.discard(sequence.key)
        self._patience.pop(sequence.key, None)
        self._promises.pop(sequence.key, None)


class _Prospect(NamedTuple):
    """What drafting could bring in steps of some number of decodes."""

    deepest: int
    """No draft token behind is worth its row, though all be right, and all of the others' too; 0: none is."""
    saved_s: float
    """Seconds of a token that this would save."""
    period: int
    """Steps between two drafts of a sequence that are likely in vain."""
    tries: int
    """Drafts in a row of which nothing is worth verifying, after which they are likely in vain."""


_NOTHING_TO_WIN = _Prospect(deepest=0, saved_s=0.0, period=_LONGEST_PERIOD, tries=1)


@dataclass(slots=True)
class _Patience:
    """How long nothing of what was drafted for a sequence was worth verifying."""

    fruitless: int = 0
    """Drafts in a row."""
    waited: int = 0
    """Steps since the last of them."""

    def is_turn(self, prospect: _Prospect, step: int) -> bool:
        """Whether to draft at this step, of which this is the only question.

        Those who wait try at the same steps: where rows are cheap by the dozen, one draft alone never pays.
        """
        if self.fruitless < prospect.tries:
            self.fruitless += 1
            return True
        self.waited += 1
        if step % prospect.period or 2 * self.waited < prospect.period:
            return False
        self.waited = 0
        return True

    def excuse(self) -> None:
        """Take the last turn back: nothing was drafted at it, and there is another at the next step."""
        self.fruitless = max(0, self.fruitless - 1)


@numba.njit(cache=True)
def _promises(chances, depths):  # type: ignore[no-untyped-def]
    """Draft tokens [num_drafts] that are expected to be accepted of as many as are verified."""
    promises = np.zeros(len(depths))
    for draft in range(len(depths)):
        promises[draft] = chances[draft, : depths[draft]].sum()
    return promises


@numba.njit(cache=True)
def _likeliest(chances, num_tokens):  # type: ignore[no-untyped-def]
    """Depths [num_drafts] of so many draft tokens in all, the likeliest there are."""
    num_drafts, longest = chances.shape
    depths = np.zeros(num_drafts, np.int64)
    following = chances[:, 0].copy()
    for _ in range(min(num_tokens, num_drafts * longest)):
        likeliest = following.argmax()
        if following[likeliest] <= 0.0:
            break
        depths[likeliest] += 1
        following[likeliest] = chances[likeliest, depths[likeliest]] if depths[likeliest] < longest else 0.0
    return depths


@numba.njit(cache=True)
def _best_depths(chances, num_decodes, knots, seconds, worth_it, unknown, most_unknown):  # type: ignore[no-untyped-def]
    """Depths [num_drafts] with the most expected tokens a second; all 0 where that is not worth it.

    Args:
        chances: float64 [num_drafts, longest draft], falling along each row, 0 behind a draft's end.
        num_decodes: tokens that the step yields and rows that it has without drafts.
        knots, seconds: costs by rows.
        unknown: bool [num_drafts], of whose source nothing is known.
        most_unknown: draft tokens of those, in all.
    """
    num_drafts, longest = chances.shape
    depths = np.zeros(num_drafts, np.int64)
    best_depths = np.zeros(num_drafts, np.int64)
    following = chances[:, 0].copy()
    left = chances.sum()
    tokens = float(num_decodes)
    plain_s = read_off(num_decodes, knots, seconds)
    plain_rate = tokens / plain_s
    best_rate, best_rows = plain_rate, num_decodes
    for rows in range(num_decodes + 1, num_decodes + num_drafts * longest + 1):
        if most_unknown <= 0:
            following[unknown] = 0.0
        likeliest = following.argmax()
        chance = following[likeliest]
        cost = read_off(rows, knots, seconds)
        # Not even all that is left would pay for this row, which no later one is cheaper than.
        if chance <= 0.0 or tokens + left <= best_rate * cost:
            break
        depths[likeliest] += 1
        following[likeliest] = chances[likeliest, depths[likeliest]] if depths[likeliest] < longest else 0.0
        most_unknown -= unknown[likeliest]
        tokens += chance
        left -= chance
        if tokens > best_rate * cost:
            best_rate, best_rows = tokens / cost, rows
            best_depths = depths.copy()
    longer_s = read_off(best_rows, knots, seconds) - plain_s
    added = best_rate * (plain_s + longer_s) - num_decodes
    if added >= _WORTH_ITS_ROWS * plain_rate * longer_s:
        worth_it = 1.0 + (worth_it - 1.0) * _FEW
    if best_rate < worth_it * plain_rate:
        best_depths[:] = 0
    return best_depths
