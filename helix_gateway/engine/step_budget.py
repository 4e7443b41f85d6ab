"""How many tokens a step may have: as many as were asked for, and fewer for a while after the device had no room.

Knows nothing about why there was no room, nor what is planned with what is left.
"""

_MOST_PATIENCE = 64
"""Good steps before the next try for more; so at worst one step in 65 is wasted on a device that stays small."""


class StepBudget:
    """The tokens of one step.

    Args:
        most: what was asked for.
    """

    def __init__(self, most: int) -> None:
        self.tokens = most
        self._most = most
        self._patience = 1
        self._good_steps = 0
        self._one_was_refused = False

    def shrink(self, num_tokens: int) -> bool:
        """A step of ``num_tokens`` did not fit: half of it from now on.  False if one token did not fit twice in a row."""
        if num_tokens < 2 and self._one_was_refused:
            self._one_was_refused = False
            return False
        self._one_was_refused = num_tokens < 2
        self.tokens = max(1, num_tokens // 2)
        self._patience = min(2 * self._patience, _MOST_PATIENCE)
        self._good_steps = 0
        return True

    def grow(self) -> None:
        """A step went well.  After enough of them the budget doubles; refusals in between ask for ever more of them."""
        self._one_was_refused = False
        self._good_steps += 1
        if self._good_steps < self._patience:
            return
        self._good_steps = 0
        if self.tokens == self._most:
            self._patience = 1
        self.tokens = min(2 * self.tokens, self._most)
