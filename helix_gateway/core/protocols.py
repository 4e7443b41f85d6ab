"""The Protocols between rooms: what the engine calls without knowing who answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from helix_gateway.core.kv import KVGroup
from helix_gateway.core.step import Int32s, LogprobRows, SamplingRows, StepBatch, UInt32s

Logits = TypeVar("Logits")


class ModelRunner(Protocol, Generic[Logits]):
    """One model on one device, over the pages of the shared pool.

    Any method may raise `OutOfMemoryError` when its device has no room; nothing is half-done then that
    running the same batch again would not repair.
    """

    @property
    def kv_groups(self) -> Sequence[KVGroup]:
        """The groups in the order of ``StepBatch.block_tables``."""

    @property
    def num_pages(self) -> int:
        """How many pages the pool's arena has."""

    @property
    def vocab_size(self) -> int:
        """How many logits a row has."""

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (source, destination) each, before the next forward."""

    def forward(self, batch: StepBatch) -> Logits:
        """Compute the batch, write its KV into the pages, return the wanted rows' logits (device's own form)."""

    def sample(self, logits: Logits, rows: SamplingRows) -> Int32s:
        """Token ids [num_samples]: ``argmax(log p + g)`` of each row; the logits stay as they are."""

    def logprobs(self, logits: Logits, logits_index: Int32s, token_ids: Int32s, top: int) -> LogprobRows:
        """Raw log-probabilities of one token for each of the given rows, and the ``top`` likeliest of each row."""


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Where a stop condition ended a sequence."""

    num_tokens: int
    """How many of the tokens just fed belong to the sequence: up to the one that completed the stop."""
    reason: str


class StopCondition(Protocol):
    """Ends one sequence by what its tokens say; holds that sequence's state."""

    def feed(self, token_ids: Sequence[int]) -> StopMatch | None:
        """Take the tokens just verified; answer where to stop, or None to go on."""


class TokenConstraint(Protocol):
    """What the next token of one sequence may be (a grammar); holds that sequence's state."""

    def fill_mask(self, mask: UInt32s) -> None:
        """Write the allowed tokens' bits over all of ``mask`` [ceil(vocab / 32)]."""

    def advance(self, token_id: int) -> None:
        """Take one token that the mask allowed and that does not end the sequence: a draft, or one for good."""

    def rollback(self, num_tokens: int) -> None:
        """Forget the last ``num_tokens`` tokens."""


@dataclass(frozen=True, slots=True)
class TranslatedDraft:
    """What some drafted tokens are in the target's vocabulary."""

    token_ids: list[int]
    """[num_tokens], the target's; fewer or more than were drafted, none where nothing is certain yet."""
    rests_on: list[int]
    """[num_tokens], how many of the drafted tokens each of these and those before it came from, never falling: so
    the confidence of token i is the product of those of the drafted tokens ``rests_on[i - 1]:rests_on[i]``."""


class TranslatedSequence(Protocol):
    """One sequence as a draft model with a tokenizer of its own reads it; holds that sequence's state.

    Only verified tokens are told to it, so nothing is ever taken back; who made it forgets it by dropping it.
    """

    @property
    def draft_token_ids(self) -> Sequence[int]:
        """The sequence in the draft model's tokens, to read only; empty where it has no word for any of it yet."""

    def extend(self, token_ids: Sequence[int]) -> int:
        """Take the target's tokens that came since; a long prompt may come in pieces.

        Returns how many of the draft tokens known before stand where they stood.  Behind those
        ``draft_token_ids`` may be new, since text that goes on may be cut into tokens in another way, and the draft
        model's KV is to be rolled back to there (unless its own drafts, which it has read too, are what is new).
        """

    def to_target(self, draft_token_ids: Sequence[int]) -> TranslatedDraft:
        """What tokens that the draft model wrote behind ``draft_token_ids`` are in the target's; changes nothing."""


class VocabularyTranslation(Protocol):
    """Between the tokens of a target model and those of a draft model; made once for a pair of tokenizers."""

    @property
    def shares_ids(self) -> bool:
        """Whether every id means the same in both, so that the draft model may sample with the target's own noise.

        Otherwise noise, which is counted by token id and position, would be other noise: then a draft model is right
        most often with the likeliest token (temperature 0).
        """

    def allowed(self, draft_vocab_size: int) -> UInt32s | None:
        """Bits [ceil(draft_vocab_size / 32)] of the draft tokens that mean something to the target; None: all."""

    def begin(self) -> TranslatedSequence:
        """The state of a fresh sequence."""
