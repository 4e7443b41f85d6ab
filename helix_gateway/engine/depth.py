"""How many draft tokens a sequence gets at a step.

A policy first bounds what is drafted, from what is known before (the scheduler reserves room for as much), and then
chooses how much of the drafts is verified.  It sees sequences and confidences, never what tokens mean.
"""

from collections.abc import Sequence as Ordered
from typing import Protocol

import numba
import numpy as np

from helix_gateway.core.step import Int32s
from helix_gateway.engine.acceptance import AcceptanceModel
from helix_gateway.engine.drafters.base import DraftTokens
from helix_gateway.engine.sequence import Sequence
from helix_gateway.engine.step_costs import StepCosts

_WORTH_IT = 1.02
"""Speculation must promise this much more: costs are estimates, and the plain step is known."""
_REACH_MARGIN = 4
_MOST_DRAFT_ROWS = 96
"""Draft tokens that a whole step has room for: prompts need the rest of its budget."""


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

    def learn(self, sequence: Sequence, draft: DraftTokens, choices: Int32s) -> None:
        """Hear what a sequence got where a draft had been proposed, verified or not."""

    def observe(self, num_rows: int, seconds: float) -> None:
        """Hear how long a step of decodes and verify windows took."""

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

    def learn(self, sequence: Sequence, draft: DraftTokens, choices: Int32s) -> None:
        """Nothing changes it."""

    def observe(self, num_rows: int, seconds: float) -> None:
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
        self._paying: dict[tuple[int, int], bool] = {}
        """What `_could_pay` answered since costs changed last: it is asked for each sequence of a step."""

    def most(self, sequence: Sequence, num_decodes: int) -> int:
        """A little more than lately proved right, or nothing where even a draft right throughout would not pay."""
        if self._min_depth:
            return self._max_depth
        depth = min(self._max_depth, _REACH_MARGIN + int(2 * self._acceptance.reach(sequence.key)))
        depth = min(depth, max(1, _MOST_DRAFT_ROWS // max(1, num_decodes)))
        return depth if self._could_pay(max(1, num_decodes), depth) else 0

    def _could_pay(self, num_decodes: int, depth: int) -> bool:
        """Whether any number of draft tokens, all of them right and everybody's together, beats the plain step."""
        known = self._paying.get((num_decodes, depth))
        if known is None:
            rows = np.arange(num_decodes, num_decodes * (1 + depth) + 1)
            rates = rows / np.interp(rows, self._costs.rows, self._costs.seconds)
            known = self._paying[num_decodes, depth] = bool(rates.max() > rates[0] * _WORTH_IT)
        return known

    def choose(self, sequences: Ordered[Sequence], drafts: Ordered[DraftTokens], num_decodes: int) -> list[int]:
        """See `DepthPolicy`."""
        chances = self._acceptance.probabilities([sequence.key for sequence in sequences], drafts)
        depths = _best_depths(chances, num_decodes, self._costs.rows, self._costs.seconds, _WORTH_IT)
        least = [min(self._min_depth, len(draft.token_ids)) for draft in drafts]
        return [max(int(depth), floor) for depth, floor in zip(depths, least, strict=True)]

    def learn(self, sequence: Sequence, draft: DraftTokens, choices: Int32s) -> None:
        """See `DepthPolicy`."""
        self._acceptance.learn(sequence.key, draft, choices)

    def observe(self, num_rows: int, seconds: float) -> None:
        """See `DepthPolicy`."""
        self._costs.observe(num_rows, seconds)
        self._paying.clear()

    def retire(self, sequence: Sequence) -> None:
        """See `DepthPolicy`."""
        self._acceptance.forget(sequence.key)


@numba.njit(cache=True)
def _best_depths(chances, num_decodes, knots, seconds, worth_it):  # type: ignore[no-untyped-def]
    """Depths [num_drafts] with the most expected tokens a second; all 0 where that is not worth it.

    Args:
        chances: float64 [num_drafts, longest draft], falling along each row, 0 behind a draft's end.
        num_decodes: tokens that the step yields and rows that it has without drafts.
        knots, seconds: costs by rows.
    """
    num_drafts, longest = chances.shape
    depths = np.zeros(num_drafts, np.int64)
    best_depths = np.zeros(num_drafts, np.int64)
    tokens = float(num_decodes)
    best_rate = worth_it * tokens / np.interp(float(num_decodes), knots, seconds)
    for rows in range(num_decodes + 1, num_decodes + 1 + num_drafts * longest):
        likeliest = -1
        chance = 0.0
        for draft in range(num_drafts):
            if depths[draft] < longest and chances[draft, depths[draft]] > chance:
                likeliest, chance = draft, chances[draft, depths[draft]]
        if likeliest < 0:
            break
        depths[likeliest] += 1
        tokens += chance
        rate = tokens / np.interp(float(rows), knots, seconds)
        if rate > best_rate:
            best_rate = rate
            best_depths[:] = depths
    return best_depths
