"""How far a draft model has come with one sequence, and the draft that it is writing for it.

Of tokens and their KV only numbers are known here; who computes them is `model.py`.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from helix_gateway.core.protocols import TranslatedSequence
from helix_gateway.engine.drafters.base import NOTHING, READING, DraftTokens
from helix_gateway.engine.drafters.growing_draft import GrowingDraft
from helix_gateway.engine.drafters.rest import Rest
from helix_gateway.engine.drafting import MODEL
from helix_gateway.engine.sequence import Sequence


@dataclass(slots=True)
class DraftReader:
    """One sequence beside its draft model's KV."""

    sequence: Sequence
    text: TranslatedSequence
    """The sequence in the draft model's tokens."""
    num_read: int = 0
    """Of the target's tokens."""
    written: list[int] = field(default_factory=list)
    """Tokens that have their KV; the last ones may be drafts."""
    rest: Rest = field(default_factory=Rest)

    @property
    def key(self) -> Hashable:
        """Names its tables in the cache."""
        return ("draft", self.sequence.key)

    @property
    def num_behind(self) -> int:
        """Tokens that have no KV yet; at least one where there is any token."""
        return len(self.text.draft_token_ids) - len(self.written)

    @property
    def num_unread(self) -> int:
        """Of the target's tokens, those that it was not told yet."""
        return len(self.sequence.token_ids) - self.num_read

    @property
    def num_lacking(self) -> int:
        """About how many tokens are to be computed before it drafts, as far as that is known before it has read all.

        Of what the target found in the cache the draft model's own will mostly be found too.
        """
        return len(self.sequence.token_ids) - max(len(self.written), self.sequence.num_cached_tokens)

    def read(self, count: int) -> None:
        """Take the next ``count`` of the target's tokens, and keep of what is written as much as still stands."""
        known = len(self.text.draft_token_ids)
        stands = self.text.extend(self.sequence.token_ids[self.num_read : self.num_read + count])
        self.num_read += count
        token_ids = self.text.draft_token_ids
        count = min(len(self.written), known, stands)
        while count < min(len(self.written), len(token_ids)) and self.written[count] == token_ids[count]:
            count += 1
        # The last token is always computed, for its logits.
        del self.written[min(count, max(0, len(token_ids) - 1)) :]

    def write(self, start: int, token_ids: list[int]) -> None:
        """These have their KV now, from position ``start`` on."""
        self.written[start:] = token_ids


@dataclass(slots=True, eq=False, kw_only=True)
class ReadDraft(GrowingDraft):
    """The draft of a sequence that its draft model has to read."""

    reader: DraftReader
    is_reading: bool = False
    """Whether the sequence is being read for it, though it be others' turn at this step."""

    @classmethod
    def begin(cls, reader: DraftReader, depth: int, stop_ids: frozenset[int]) -> "ReadDraft":
        """An empty one."""
        sequence, key = reader.sequence, reader.key
        return cls(sequence=sequence, key=key, source=MODEL, depth=depth, stop_ids=stop_ids, reader=reader)

    @property
    def position(self) -> int:
        """Where its next token will stand among the draft model's own, whose KV is counted so."""
        return len(self.reader.text.draft_token_ids) + len(self.token_ids)

    def proposal(self) -> DraftTokens:
        """In the target's tokens."""
        if not self.token_ids:
            return READING if self.is_reading else NOTHING
        told = self.reader.text.to_target(self.token_ids)
        bounds = [0, *told.rests_on]
        confidences = [np.prod(self.confidences[a:b]) for a, b in pairwise(bounds)]
        return DraftTokens(MODEL, np.array(told.token_ids, np.int32), np.array(confidences, np.float32))
