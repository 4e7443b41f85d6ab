"""A drafter that memory may be too short for: it costs drafts then, and is left alone for a while.

No step is made smaller for the sake of drafts.  Knows nothing about how anything is drafted.
"""

from collections.abc import Sequence as Ordered

import structlog

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.engine.drafters.base import NOTHING, ChoosyDrafter, DraftTokens
from helix_gateway.engine.drafters.rest import Rest
from helix_gateway.engine.sequence import Sequence

log = structlog.get_logger(__name__)


class RestingDrafter:
    """`ChoosyDrafter` around another, which rests where its drafting finds no memory."""

    def __init__(self, drafter: ChoosyDrafter) -> None:
        self._drafter = drafter
        self._step = 0
        self._rest = Rest()

    def begin_step(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[int]:
        """See `ChoosyDrafter`."""
        self._step += 1
        # At rest too: steps that a drafter leaves single sequences alone for pass meanwhile.
        able = self._drafter.begin_step(sequences, depths)
        return [0] * len(sequences) if self._step < self._rest.until else able

    def propose(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[DraftTokens]:
        """See `Drafter`."""
        try:
            drafts = self._drafter.propose(sequences, depths)
        except (OutOfMemoryError, MemoryError) as error:
            log.warning("no_memory_for_drafts", reason=str(error), steps_without=self._rest.steps)
            self._rest.begin(self._step)
            self._drafter.give_back()
            return [NOTHING] * len(sequences)
        if any(len(draft.token_ids) for draft in drafts):
            # Not sooner: what breaks off at a later token is the same shortage again.
            self._rest.forget()
        return drafts

    def give_back(self) -> None:
        """See `ChoosyDrafter`."""
        self._drafter.give_back()

    def retire(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        self._drafter.retire(sequence)
