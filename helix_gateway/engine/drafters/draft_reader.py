"""How far a draft model has come with one sequence, and the draft that it is writing for it.

Of tokens and their KV only numbers are known here; who computes them is `model.py`.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from helix_gateway.core.protocols import TranslatedSequence
from helix_gateway.engine.drafters.base import NOTHING, READING, DraftTokens
from helix_gateway.engine.drafting import MODEL
from helix_gateway.engine.sequence import Sequence

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


@dataclass(slots=True, eq=False)
class GrowingDraft:
    """One sequence's draft, token by token."""

    reader: DraftReader
    depth: int
    """Most tokens that it may have."""
    stop_ids: frozenset[int]
    """Tokens behind which nothing can follow."""
    token_ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    is_reading: bool = False
    """Whether the sequence is being read for it, though it be others' turn at this step."""

    @property
    def position(self) -> int:
        """Where its next token will stand among the draft model's own, whose KV is counted so."""
        return len(self.reader.text.draft_token_ids) + len(self.token_ids)

    @property
    def target_position(self) -> int:
        """Where the target will draw that token, which says with what noise: tokens that it alone has are counted too."""
        return len(self.reader.sequence.token_ids) + len(self.token_ids)

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow: it is as long as it may be, or ends the sequence."""
        return len(self.token_ids) >= self.depth or not self.stop_ids.isdisjoint(self.token_ids[-1:])

    def append(self, token_id: int, confidence: float) -> None:
        """Take the next token."""
        self.token_ids.append(token_id)
        self.confidences.append(confidence)

    def as_drafted(self) -> DraftTokens:
        """In the draft model's tokens, for whoever judges whether it goes on."""
        return DraftTokens(MODEL, np.array(self.token_ids, np.int32), np.array(self.confidences, np.float32))

    def proposal(self) -> DraftTokens:
        """In the target's tokens."""
        if not self.token_ids:
            return READING if self.is_reading else NOTHING
        told = self.reader.text.to_target(self.token_ids)
        bounds = [0, *told.rests_on]
        confidences = [np.prod(self.confidences[a:b]) for a, b in pairwise(bounds)]
        return DraftTokens(MODEL, np.array(told.token_ids, np.int32), np.array(confidences, np.float32))
