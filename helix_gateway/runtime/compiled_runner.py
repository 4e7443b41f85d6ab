"""A model as the engine's `ModelRunner` without transformers: what an earlier start has checked, computed by compiled code.

Trusted only if it answers a trial bit by bit as what was held to transformers' modules then.  Knows nothing about requests
or schedules.
"""

from helix_gateway.runtime.cpu.compiled_steps import step_of
from helix_gateway.runtime.cpu.parts import Parts
from helix_gateway.runtime.paged_runner import AGREED, ModelPages, PagedRunner, digest_of
from helix_gateway.runtime.remembered import Remembered


class NotAsBeforeError(Exception):
    """What was written down of a model does not compute what it did."""


class CompiledRunner(PagedRunner):
    """A runner of a model's parts.

    Args:
        parts: the model.
        pages: where its keys and values lie.
        vocab_size: how many logits a row has.
        context_length: tokens that one sequence may have.
        remembered: what is known of it, the digest of its answers too.

    Raises:
        NotAsBeforeError: there is no compiled step of it, or it answers otherwise than it did.
    """

    def __init__(
        self, parts: Parts, pages: ModelPages, *, vocab_size: int, context_length: int, remembered: Remembered
    ) -> None:
        step = step_of(parts, pages.attention)
        if step is None:
            raise NotAsBeforeError("there is no compiled step of it")
        super().__init__(
            pages, vocab_size=vocab_size, context_length=context_length, compute=step, remembered=remembered
        )
        self.parts = parts
        steps = self._trial_steps()
        if digest_of(steps, self._answers(steps)) != remembered.get(AGREED):
            raise NotAsBeforeError("its answers are others than they were")
