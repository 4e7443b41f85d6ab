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
