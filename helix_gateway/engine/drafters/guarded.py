"""A drafter whose faults are nobody's trouble: a sequence that it raises for goes on without it.

Drafts are a convenience; a request must not fail for want of one.
"""

from collections.abc import Sequence as Ordered

import structlog

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.engine.drafters.base import NOTHING, ChoosyDrafter, Drafter, DraftTokens
from helix_gateway.engine.sequence import Sequence, SequenceKey

log = structlog.get_logger(__name__)


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
        drafts = [NOTHING for _ in sequences]
        served = [index for index, sequence in enumerate(sequences) if sequence.key not in self._switched_off]
        if served:
            proposed = self._propose([sequences[index] for index in served], [depths[index] for index in served])
            for index, draft in zip(served, proposed, strict=True):
                drafts[index] = draft
        return drafts

    def _propose(self, sequences: list[Sequence], depths: list[int]) -> list[DraftTokens]:
        try:
            return self._checked(self._drafter.propose(sequences, depths), depths)
        except OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - logged where the sequence is switched off
            if len(sequences) > 1:
                # One of them is to blame; the others keep their drafts.
                pairs = zip(sequences, depths, strict=True)
                return [draft for sequence, depth in pairs for draft in self._propose([sequence], [depth])]
            self._switch_off(sequences[0], error)
            return [NOTHING]

    def _switch_off(self, sequence: Sequence, error: Exception) -> None:
        self._switched_off.add(sequence.key)
        self._forget(sequence)
        log.warning("drafter_switched_off", request_id=sequence.request.request_id, reason=repr(error), exc_info=error)

    def _checked(self, drafts: list[DraftTokens], depths: list[int]) -> list[DraftTokens]:
        """The drafts, cut to their depths.  Raises ValueError where they are not what the Protocol says."""
        for draft in drafts:
            ids = draft.token_ids
            if len(draft.confidences) != len(ids) or (len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size):
                raise ValueError(f"{draft.source} proposed what is no draft")
        return [draft.first(depth) for draft, depth in zip(drafts, depths, strict=True)]

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
        able = [0 for _ in sequences]
        served = [index for index, sequence in enumerate(sequences) if sequence.key not in self._switched_off]
        rooms = self._rooms([sequences[index] for index in served], [depths[index] for index in served])
        for index, room in zip(served, rooms, strict=True):
            able[index] = room
        return able

    def _rooms(self, sequences: list[Sequence], depths: list[int]) -> list[int]:
        try:
            return self._choosy.begin_step(sequences, depths)
        except OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - logged where the sequence is switched off
            if len(sequences) > 1:
                pairs = zip(sequences, depths, strict=True)
                return [room for sequence, depth in pairs for room in self._rooms([sequence], [depth])]
            if sequences:
                self._switch_off(sequences[0], error)
            return [0 for _ in sequences]
