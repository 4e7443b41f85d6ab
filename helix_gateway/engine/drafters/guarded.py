"""A drafter whose faults are nobody's trouble: a sequence that it raises for goes on without it.

Drafts are a convenience; a request must not fail for want of one.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from typing import TypeAlias, TypeVar

import numpy as np
import structlog

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.engine.drafters.base import NOTHING, ChoosyDrafter, Drafter, DraftTokens
from helix_gateway.engine.sequence import Sequence, SequenceKey

log = structlog.get_logger(__name__)

T = TypeVar("T")
_Question: TypeAlias = Callable[[list[Sequence], list[int]], list[T]]
"""Something that a drafter answers for each of some sequences, given their depths."""


class GuardedDrafter:
    """`Drafter` around another.

    Args:
        vocab_size: compiled code trusts ids to be below it.
    """

    def __init__(self, drafter: Drafter, vocab_size: int) -> None:
        self._drafter = drafter
        self._vocab_size = vocab_size
        self._switched_off: set[SequenceKey] = set()

    def propose(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[DraftTokens]:
        """See `Drafter`.  Raises OutOfMemoryError as the drafter does: the step is made smaller for that."""
        return self._of_each(self._proposed, NOTHING, sequences, depths)

    def _of_each(self, ask: _Question[T], nothing: T, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[T]:
        """What the drafter says of each sequence; ``nothing`` of those that it is switched off for, now or before."""
        found = [nothing for _ in sequences]
        served = [index for index, sequence in enumerate(sequences) if sequence.key not in self._switched_off]
        if served:
            said = self._said(ask, nothing, [sequences[index] for index in served], [depths[index] for index in served])
            for index, one in zip(served, said, strict=True):
                found[index] = one
        return found

    def _said(self, ask: _Question[T], nothing: T, sequences: list[Sequence], depths: list[int]) -> list[T]:
        try:
            return ask(sequences, depths)
        except OutOfMemoryError:
            raise
        except Exception as error:
            if len(sequences) > 1:
                # One of them is to blame; the others keep what they get.
                pairs = zip(sequences, depths, strict=True)
                return [one for sequence, depth in pairs for one in self._said(ask, nothing, [sequence], [depth])]
            self._switched_off.add(sequences[0].key)
            self._forget(sequences[0])
            log.warning(
                "drafter_switched_off", request_id=sequences[0].request.request_id, reason=repr(error), exc_info=error
            )
            return [nothing]

    def _proposed(self, sequences: list[Sequence], depths: list[int]) -> list[DraftTokens]:
        return self._checked(self._drafter.propose(sequences, depths), depths)

    def _checked(self, drafts: list[DraftTokens], depths: list[int]) -> list[DraftTokens]:
        """The drafts, cut to their depths.  Raises ValueError where they are not what the Protocol says."""
        ids = np.concatenate([draft.token_ids for draft in drafts])
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise ValueError(f"{self._beyond(drafts)} proposed tokens that are none")
        for draft in drafts:
            if len(draft.confidences) != len(draft.token_ids):
                raise ValueError(f"{draft.source} proposed what is no draft")
        return [draft.first(depth) for draft, depth in zip(drafts, depths, strict=True)]

    def _beyond(self, drafts: list[DraftTokens]) -> str:
        """Whose tokens the vocabulary does not have."""
        ids = ((draft.source, draft.token_ids) for draft in drafts)
        return ", ".join(sorted({source for source, its in ids if (its < 0).any() or (its >= self._vocab_size).any()}))

    def retire(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        self._switched_off.discard(sequence.key)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """Let the drafter give back what it holds; it may hear of it twice."""
        try:
            self._drafter.retire(sequence)
        except Exception:
            log.exception("drafter_failed_to_forget", request_id=sequence.request.request_id)


class GuardedChoosyDrafter(GuardedDrafter):
    """`ChoosyDrafter` around another, which cannot draft for those either for whom it is switched off."""

    def __init__(self, drafter: ChoosyDrafter, vocab_size: int) -> None:
        super().__init__(drafter, vocab_size)
        self._choosy = drafter

    def begin_step(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[int]:
        """See `ChoosyDrafter`."""
        return self._of_each(self._choosy.begin_step, 0, sequences, depths)

    def give_back(self) -> None:
        """See `ChoosyDrafter`."""
        self._choosy.give_back()
