"""Whether a drafter whose drafts cost something is asked at a step, for whom, and how far it goes on.

What drafts will be worth has to be foreseen from how the drafter's tokens fared before (`acceptance.py`), and what they
cost from measured forwards of the draft model beside measured steps of the target (`step_costs.py`).  Drafts that are
free, already there when this is decided, are what it is held against.  Knows nothing about how anything is drafted.
"""

from collections.abc import Hashable
from collections.abc import Sequence as Ordered
from typing import Protocol

import numba
import numpy as np
import numpy.typing as npt

from helix_gateway.core.inner_functions import INNER
from helix_gateway.engine.acceptance import AcceptanceModel, Float64s
from helix_gateway.engine.depth import ANSWER_TOKENS, WORTH_IT
from helix_gateway.engine.drafters.base import DraftTokens
from helix_gateway.engine.sequence import Sequence
from helix_gateway.engine.step_costs import StepCosts, read_off

MODEL = "model"
"""The source of a draft model's drafts."""
SELF = "self"
"""The source of drafts by the target's own weights at fewer bits."""
_DEEPEST = 16
"""Tokens that are foreseen: a model is seldom right for longer, and each costs a forward."""
_MOST_ROWS = 96
"""Draft tokens of all sequences together that are weighed."""
_FEW = 8
"""Sequences of which each is tried both ways."""
_FORGOTTEN = 1e-3
"""Share of what is known of a drafter that a step in which it is not asked forgets: a try again within minutes."""
_LOOK_AFTER = 400
"""Steps in a row in which a drafter is not asked that is likely right, after which one of its forwards is made to see what it
costs now: it may have been measured while the machine was busy.  At a third of a step's time each, a thousandth of all."""
_LIKELY = 0.5
"""Chance of a first token from which on a drafter is likely right, so that costs alone speak against it: that it is sooner
right than wrong.  Chosen, not measured."""

Int64s = npt.NDArray[np.int64]


class DraftingPolicy(Protocol):
    """Chooses when a drafter that costs is asked."""

    def ask(
        self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens], depths: Ordered[int], num_decodes: int
    ) -> list[int]:
        """How many tokens to draft for each sequence, beside what it has for nothing.

        Args:
            sequences, drafts: those that may have drafts, and what is drafted for them already, which may be nothing.
            depths: most draft tokens that can be drafted for each; 0 where none can, who costs its row all the same.
            num_decodes: sequences that get a token in this step, drafted for or not.
        """

    def worth_catching_up(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether so many tokens that the draft model has not read yet are worth reading."""

    def goes_on(self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens]) -> list[bool]:
        """For whom one more token is drafted, given what was drafted so far, which may be nothing."""

    def better(
        self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens], others: Ordered[DraftTokens]
    ) -> list[bool]:
        """For each sequence whether a draft is expected to bring more than the other one."""

    def observe(self, num_rows: int, seconds: float) -> None:
        """Hear how long a forward of the draft model took, sampling included."""


class AlwaysDrafting:
    """Whoever may have drafts gets them from the drafter that costs; for those who test or measure it alone."""

    def ask(
        self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens], depths: Ordered[int], num_decodes: int
    ) -> list[int]:
        """As many as each may have."""
        return list(depths)

    def worth_catching_up(self, sequence: Sequence, num_tokens: int) -> bool:
        """Always."""
        return True

    def goes_on(self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens]) -> list[bool]:
        """For everybody."""
        return [True] * len(sequences)

    def better(
        self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens], others: Ordered[DraftTokens]
    ) -> list[bool]:
        """Where there is a draft."""
        return [len(draft.token_ids) > 0 for draft in drafts]

    def observe(self, num_rows: int, seconds: float) -> None:
        """Nothing changes it."""


class AdaptiveDrafting:
    """Asks where drafting and verifying together promise most tokens a second over the whole batch.

    Args:
        costs: of a step of the target, by rows.
        draft_costs: of a forward of the draft model, by rows.
        acceptance: what became of drafts; somebody else lets it learn.
        source: of the drafts.
        min_depth: drafted at least, whether it pays or not; for those who test.
    """

    def __init__(
        self,
        costs: StepCosts,
        draft_costs: StepCosts,
        acceptance: AcceptanceModel,
        *,
        source: str = MODEL,
        min_depth: int = 0,
    ) -> None:
        self._costs = costs
        self._draft_costs = draft_costs
        self._acceptance = acceptance
        self._source = source
        self._min_depth = min_depth
        self._num_rows = 0
        """Rows that the target's forward will have, as far as is known."""
        self._rate = 0.0
        """Tokens a second that are expected of this step."""
        self._saved_s = 0.0
        """Seconds a token that drafting is expected to save."""
        self._foreseen: dict[Hashable, Float64s] = {}
        """What was foreseen for each sequence of this step."""
        self._unasked = 0
        """Steps in a row in which costs alone spoke against it."""
        self._is_looking = False

    def ask(
        self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens], depths: Ordered[int], num_decodes: int
    ) -> list[int]:
        """See `DraftingPolicy`."""
        if not any(depths):
            return [0] * len(depths)
        keys = [sequence.key for sequence in sequences]
        foreseen = self._acceptance.foreseen(self._source, keys, min(_DEEPEST, max(depths)))
        foreseen[np.arange(foreseen.shape[1])[None, :] >= np.array(depths)[:, None]] = 0.0
        planned, self._rate, rate_without, self._num_rows = _plan_drafting(
            self._acceptance.probabilities(keys, drafts),
            foreseen,
            num_decodes,
            self._costs.rows,
            self._costs.seconds,
            self._draft_costs.rows,
            self._draft_costs.seconds,
            WORTH_IT,
        )
        self._saved_s = 1 / rate_without - 1 / self._rate
        self._foreseen = dict(zip(keys, foreseen, strict=True))
        if not planned.any():
            self._acceptance.fade(self._source, _FORGOTTEN)
        self._look(planned, foreseen[:, 0])
        return [
            max(int(depth), 0 if len(draft.token_ids) >= self._min_depth else min(self._min_depth, most))
            for depth, draft, most in zip(planned, drafts, depths, strict=True)
        ]

    def _look(self, planned: Int64s, chances: Float64s) -> None:
        """Plan a token for the likeliest, after many steps without any."""
        likeliest = int(chances.argmax())
        self._unasked = 0 if planned.any() or chances[likeliest] < _LIKELY else self._unasked + 1
        self._is_looking = self._unasked >= _LOOK_AFTER
        if self._is_looking:
            planned[likeliest], self._unasked = 1, 0

    def worth_catching_up(self, sequence: Sequence, num_tokens: int) -> bool:
        """See `DraftingPolicy`."""
        # An answer of unknown length is believed to go on for as long again as it is already, and then some.
        expected = ANSWER_TOKENS + sequence.num_output_tokens
        if sequence.request.sampling.max_tokens is not None:
            expected = min(expected, sequence.request.sampling.max_tokens - sequence.num_output_tokens)
        return self._min_depth > 0 or expected * self._saved_s > self._draft_costs.seconds_for(num_tokens)

    def goes_on(self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens]) -> list[bool]:
        """See `DraftingPolicy`."""
        keys = [sequence.key for sequence in sequences]
        so_far = [len(draft.token_ids) for draft in drafts]
        reached = self._acceptance.probabilities(keys, drafts)
        gains = np.array([self._gain(key, reached[i, :n]) for i, (key, n) in enumerate(zip(keys, so_far, strict=True))])
        chosen = _worth_drafting(
            gains,
            self._num_rows,
            self._rate,
            self._costs.rows,
            self._costs.seconds,
            self._draft_costs.rows,
            self._draft_costs.seconds,
        )
        self._num_rows += int(chosen.sum())
        least = max(1, self._min_depth) if self._is_looking else self._min_depth
        return [bool(one) or n < least for one, n in zip(chosen, so_far, strict=True)]

    def _gain(self, key: Hashable, reached: Float64s) -> float:
        """What one more token adds, given how sure its drafter was of those before it."""
        foreseen, place = self._foreseen[key], len(reached)
        if place >= len(foreseen) or not foreseen[place]:
            return 0.0
        return float(reached[-1] * foreseen[place] / foreseen[place - 1]) if place else float(foreseen[0])

    def better(
        self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens], others: Ordered[DraftTokens]
    ) -> list[bool]:
        """See `DraftingPolicy`."""
        keys = [sequence.key for sequence in sequences]
        expected, instead = (self._acceptance.probabilities(keys, these).sum(axis=1) for these in (drafts, others))
        return [bool(better) for better in expected > instead]

    def observe(self, num_rows: int, seconds: float) -> None:
        """See `DraftingPolicy`."""
        self._draft_costs.observe(num_rows, seconds)


@numba.njit(cache=True)
def _plan_drafting(  # type: ignore[no-untyped-def]
    free, foreseen, num_decodes, knots, seconds, draft_knots, draft_seconds, worth_it
):
    """Depths [num_seqs] that are to be drafted at a cost, all 0 where that is not worth it; the tokens a second that are
    expected then, and without it; the rows that the target has before any of those drafts.

    Those who gain most are tried with costly drafts, more and more of them and to several depths, since a forward costs
    little more for many than for one; the others with what is free.  Of few each is then tried the other way round.

    Args:
        free, foreseen: float64 [num_seqs, longest], chances of the drafts that are there and of those that could be.
        num_decodes: tokens that the step yields and rows that it has without drafts.
        knots, seconds, draft_knots, draft_seconds: costs by rows of the target's steps and of the draft model's forwards.
    """
    num_seqs = len(free)
    step_s = np.array([read_off(num_decodes + more, knots, seconds) for more in range(1 + _MOST_ROWS)])
    draft_s = np.zeros(num_seqs + 1)
    for rows in range(1, num_seqs + 1):
        draft_s[rows] = read_off(rows, draft_knots, draft_seconds)
    order = np.argsort(free.sum(axis=1) - foreseen.sum(axis=1))
    costly = np.zeros(num_seqs, np.bool_)
    deepest = foreseen.shape[1]
    depths, rate_without = _fill(free, foreseen, costly, deepest, num_decodes, step_s, draft_s)
    best_rate, best_depths = rate_without * worth_it, np.zeros(num_seqs, np.int64)
    best_costly, best_deepest, free_rows = costly.copy(), deepest, depths.sum()
    count, tried = 1, 0
    while tried < num_seqs:
        costly[order[tried:count]] = True
        tried = count
        count = min(num_seqs, count + max(1, count // 2))
        for most in (deepest, 4, 2, 1):
            depths, rate = _fill(free, foreseen, costly, most, num_decodes, step_s, draft_s)
            if rate > best_rate and (depths * costly).any():
                best_rate, best_deepest, free_rows = rate, most, (depths * ~costly).sum()
                best_costly = costly.copy()
                best_depths = depths * costly
    for i in range(num_seqs if num_seqs <= _FEW else 0):
        costly = best_costly.copy()
        costly[i] = not costly[i]
        depths, rate = _fill(free, foreseen, costly, best_deepest, num_decodes, step_s, draft_s)
        if rate > best_rate and (depths * costly).any():
            best_rate, free_rows = rate, (depths * ~costly).sum()
            best_costly = costly.copy()
            best_depths = depths * costly
    rate = best_rate if best_depths.any() else rate_without
    return best_depths, rate, rate_without, num_decodes + free_rows


@numba.njit(cache=True, **INNER)
def _fill(free, foreseen, costly, deepest, num_decodes, step_s, draft_s):  # type: ignore[no-untyped-def]
    """The best depths where it is settled whose drafts are costly: likeliest tokens first, as `depth.py` has it.

    Args:
        deepest: no costly draft has more tokens.
        step_s, draft_s: seconds of a step with so many draft tokens, and of a draft forward of so many rows.
    """
    num_seqs = len(free)
    following, left = np.zeros(num_seqs), 0.0
    for i in range(num_seqs):
        following[i] = _chance(free, foreseen, costly, i, 0)
        left += foreseen[i, :deepest].sum() if costly[i] else free[i].sum()
    depths = np.zeros(num_seqs, np.int64)
    best_depths = depths.copy()
    counts = np.zeros(max(free.shape[1], foreseen.shape[1]) + 1, np.int64)
    tokens, drafting = float(num_decodes), 0.0
    best_rate = tokens / step_s[0]
    for rows in range(1, len(step_s)):
        likeliest = following.argmax()
        chance = following[likeliest]
        # Not even all that is left would pay for this row, which no later one is cheaper than.
        if chance <= 0.0 or tokens + left <= best_rate * (step_s[rows] + drafting):
            break
        level = depths[likeliest]
        if costly[likeliest]:
            counts[level] += 1
            drafting += draft_s[counts[level]] - draft_s[counts[level] - 1]
        depths[likeliest] += 1
        following[likeliest] = _chance(free, foreseen, costly, likeliest, level + 1)
        if costly[likeliest] and level + 1 >= deepest:
            following[likeliest] = 0.0
        tokens += chance
        left -= chance
        if tokens > best_rate * (step_s[rows] + drafting):
            best_rate = tokens / (step_s[rows] + drafting)
            best_depths = depths.copy()
    return best_depths, best_rate


@numba.njit(cache=True, **INNER)
def _chance(free, foreseen, costly, i, place):  # type: ignore[no-untyped-def]
    if costly[i]:
        return foreseen[i, place] if place < foreseen.shape[1] else 0.0
    return free[i, place] if place < free.shape[1] else 0.0


@numba.njit(cache=True)
def _worth_drafting(gains, num_rows, rate, knots, seconds, draft_knots, draft_seconds):  # type: ignore[no-untyped-def]
    """Bools [num_seqs]: whose next token is drafted, for most tokens beyond what its seconds would bring at ``rate``."""
    order = np.argsort(-gains)
    before = read_off(num_rows, knots, seconds)
    best, best_count, tokens = 0.0, 0, 0.0
    for count in range(1, len(gains) + 1):
        tokens += gains[order[count - 1]]
        longer = read_off(num_rows + count, knots, seconds) - before
        surplus = tokens - rate * (longer + read_off(count, draft_knots, draft_seconds))
        if surplus > best:
            best, best_count = surplus, count
    chosen = np.zeros(len(gains), np.bool_)
    chosen[order[:best_count]] = True
    return chosen
