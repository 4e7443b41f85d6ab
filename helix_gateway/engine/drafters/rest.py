"""How long something that memory was too short for is left alone.  Knows nothing about what that is."""

from dataclasses import dataclass

_FIRST_REST = 16
_LONGEST_REST = 4096


@dataclass(slots=True)
class Rest:
    """Leaves something alone for ever more steps while memory that was short is found short again."""

    until: int = 0
    steps: int = _FIRST_REST

    def begin(self, now: int) -> None:
        """From the step ``now`` on."""
        self.until = now + self.steps
        self.steps = min(2 * self.steps, _LONGEST_REST)

    def forget(self) -> None:
        """There was memory enough for a draft: the next shortage is a new one."""
        self.steps = _FIRST_REST
