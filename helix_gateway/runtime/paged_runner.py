"""What all runners of models over the pool's pages share, whatever computes: `core.protocols.ModelRunner` but the forward.

Knows nothing about requests or schedules, nor about where a model's computation comes from.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from helix_gateway.core.kv import KVGroup
from helix_gateway.core.step import Int32s, LogprobRows, SamplingRows, StepBatch
from helix_gateway.runtime.cpu.parts import Parts
from helix_gateway.runtime.cpu.quantised_weights import QuantisedWeight
from helix_gateway.runtime.device import memory_errors_named
from helix_gateway.runtime.paged_attention import PagedAttention
from helix_gateway.runtime.pages import Arena, GroupLayout
from helix_gateway.runtime.remembered import Remembered
from helix_gateway.runtime.sampling import make_sampler
from helix_gateway.runtime.trial import fill_pages, trial_steps

AGREED = "compiled_step_agreed"
"""Under which the digest of a trial is remembered whose answers were held to transformers' modules."""

Compute: TypeAlias = Callable[[StepBatch], torch.Tensor]
"""A forward: the wanted rows' logits of a batch."""


@dataclass(frozen=True, slots=True)
class ModelPages:
    """What one model has of the pool."""

    arena: Arena
    groups: tuple[GroupLayout, ...]
    """Its own among those of the arena."""
    attention: PagedAttention
    """Of its layers, over those groups."""


class PagedRunner:
    """`core.protocols.ModelRunner` over some pages.

    Args:
        pages: where keys and values lie.
        vocab_size: how many logits a row has.
        context_length: tokens that one sequence may have.
        compute: the forward, for pages that have been told of the batch.
        remembered: what is known of the model as it is served here.
    """

    def __init__(
        self, pages: ModelPages, *, vocab_size: int, context_length: int, compute: Compute, remembered: Remembered
    ) -> None:
        self._pages = pages
        self._device = pages.arena.memory.device
        self._vocab_size = vocab_size
        self.context_length = context_length
        """Tokens that one sequence may have."""
        self._compute = compute
        self.remembered = remembered
        """What is known of the model, for whoever measures it."""
        self.parts: Parts | None = None
        """What the model is made of, where compiled code computes it."""
        self._sampler = make_sampler(self._device, vocab_size)

    @property
    def kv_groups(self) -> Sequence[KVGroup]:
        """See `ModelRunner`."""
        return tuple(group.kv_group for group in self._pages.groups)

    @property
    def num_pages(self) -> int:
        """See `ModelRunner`."""
        return self._pages.arena.num_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, over all layers."""
        return self._pages.arena.layout.page_bytes

    @property
    def kv_dtype(self) -> torch.dtype:
        """What keys and values are stored in."""
        return self._pages.arena.layout.dtype

    @property
    def is_quantised(self) -> bool:
        """Whether compiled code computes with quantised weights."""
        return self.parts is not None and isinstance(self.parts.head.weight_tiles, QuantisedWeight)

    @property
    def vocab_size(self) -> int:
        """See `ModelRunner`."""
        return self._vocab_size

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """See `ModelRunner`."""
        with memory_errors_named():
            self._pages.arena.copy_pages(copies)

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Logits [num_rows, vocab_size], float32, on the runner's device."""
        with memory_errors_named(), torch.inference_mode():
            self._pages.attention.begin(batch)
            return self._compute(batch).float()

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> Int32s:
        """See `ModelRunner`."""
        with memory_errors_named(), torch.inference_mode():
            return self._sampler.sample(logits, rows)

    def logprobs(self, logits: torch.Tensor, logits_index: Int32s, token_ids: Int32s, top: int) -> LogprobRows:
        """See `ModelRunner`."""
        with memory_errors_named(), torch.inference_mode():
            return self._sampler.logprobs(logits, logits_index, token_ids, top)

    def beside(self, find_step: Callable[[PagedAttention], Compute], parts: Parts) -> "PagedRunner":
        """A runner of another form of the model over the same pages; only one of both may compute at a time.

        Args:
            find_step: the forward over such pages; what it raises is raised here.
            parts: what that computes with.
        """
        other = copy.copy(self)
        other._compute, other.parts = find_step(self._pages.attention), parts
        return other

    def _trial_steps(self) -> list[StepBatch]:
        return trial_steps(self._vocab_size, self.kv_groups, self.num_pages, self.context_length)

    def _answers(self, steps: Sequence[StepBatch]) -> torch.Tensor:
        fill_pages(self._pages.arena, steps)
        return torch.cat([self.forward(step) for step in steps])


def digest_of(steps: Sequence[StepBatch], answers: torch.Tensor) -> str:
    """A name for what was asked and for every bit of what was answered."""
    digest = hashlib.sha256(answers.numpy().tobytes())
    for step in steps:
        arrays = (step.token_ids, step.positions, step.cu_seqlens, step.context_lens, *step.block_tables)
        for array in (*arrays, step.logits_rows):
            digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()
