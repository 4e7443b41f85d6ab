"""A transformers model as the engine's `ModelRunner`: one ragged forward over paged keys and values, on any device.

The flat batch goes through the model as one sequence of ``num_tokens``; what belongs together, attention alone decides
(`transformers_attention.py`).  Logits are computed for the wanted rows only.  Knows nothing about requests or schedules.
"""

from collections.abc import Callable, Sequence
from functools import partial

import structlog
import torch
from transformers import PreTrainedModel

from helix_gateway.core.step import Int32s, StepBatch
from helix_gateway.runtime import transformers_attention
from helix_gateway.runtime.context import context_length
from helix_gateway.runtime.cpu.activations import keep_rows_apart
from helix_gateway.runtime.cpu.compiled_steps import step_of
from helix_gateway.runtime.cpu.quantising import computing_exactly, dequantise, is_quantised
from helix_gateway.runtime.cpu.structures import parts_of, why_unknown
from helix_gateway.runtime.paged_runner import AGREED, Compute, ModelPages, PagedRunner, digest_of
from helix_gateway.runtime.probe import ModelProbe
from helix_gateway.runtime.remembered import NothingRemembered, Remembered
from helix_gateway.runtime.rotary import install_rotary_tables
from helix_gateway.runtime.transformers_attention import PagedLayer, attach

log = structlog.get_logger(__name__)

_AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Largest difference between the compiled step's logits and transformers', as a share of the largest logit."""
_QUANTISED_AGREEMENT = 0.25
"""Largest size of the difference between a quantised model's logits and those of the float32 model of the same weights,
as a share of the logits' spread, in the middle row of a trial.  Activations are rounded to int8, tokens and context are
of no meaning: SmolLM2 differs by 0.11 in int8, by 0.2 in four bits of a float model, wrong products by 1.2, noise by
1.4."""
_ODD = 0.6
"""By more, a row is odd: it means nothing, and tips over.  Of four bits of a float SmolLM2 one does (1.08), and none of
the others is beyond 0.3; in int8 the two that read far pages of no meaning differ by 0.53, and none of the others by more
than 0.12.  It tells nothing about the compiled step, which may differ by no more in any other row."""
_ROWS_TO_AN_ODD_ONE = 10
"""Of so many rows one may be odd; a smaller trial may have none."""
_TIMES_ROUNDING = 2.0
"""How much more the compiled step of a quantised model may differ from its modules than these differ from float32, in the
worst rows that are not odd: SmolLM2 differs as much (0.18 and 0.17 over its file's blocks; in int8 what is odd is the
bound), tiny models not at all, a step that is wrong in a few rows 4 to 20 times as much."""
_STORED_AGREEMENT = {torch.float32: 0.0, torch.bfloat16: 0.02, torch.int8: 0.02}
"""The same for what keys and values are stored in: a difference in the last bit may round a key the other way."""


class TransformersRunner(PagedRunner):
    """A runner of a loaded ``ForCausalLM``; `pool.make_runners` makes one.

    The model is changed for good: its attention reads the runner's pages, its rotary embeddings become tables,
    and on a CPU its activations keep rows apart.

    Args:
        model: on the arena's device, in evaluation mode.
        probe: what `probe.find_attention_layers` says of it.
        pages: where its keys and values lie.
        remembered: what is known of the model as it is served here; None: nothing.
    """

    def __init__(
        self, model: PreTrainedModel, probe: ModelProbe, pages: ModelPages, remembered: Remembered | None = None
    ) -> None:
        super().__init__(
            pages,
            vocab_size=probe.vocab_size,
            context_length=context_length(model.config),
            compute=self._through_transformers,
            remembered=remembered or NothingRemembered(),
        )
        self._model = model
        self.uses = tuple(layer.use for layer in probe.layers)
        """What each layer does with keys and values."""
        for number, layer in enumerate(probe.layers):
            attach(layer.module, PagedLayer(pages.attention, number))
        model.set_attn_implementation(transformers_attention.NAME)
        self._rotary = install_rotary_tables(model, self.context_length)
        if self._device.type == "cpu":
            keep_rows_apart(model)
        self._wanted = _WantedRows(_output_embedding(model))
        if self._device.type == "cpu":
            self._take_shortcut()

    @property
    def model(self) -> PreTrainedModel:
        """What it was made of, as it is now: packed, and with attention over pages."""
        return self._model

    def _through_transformers(self, batch: StepBatch) -> torch.Tensor:
        for table in self._rotary:
            table.reserve(int(batch.context_lens.max()))
        self._wanted.rows = self._indices(batch.logits_rows)
        output = self._model(
            input_ids=self._indices(batch.token_ids)[None],
            position_ids=self._indices(batch.positions)[None],
            use_cache=False,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _take_shortcut(self) -> None:
        """Compute through the compiled step from now on, if the model has one that agrees with transformers' own.

        A quantised model's modules are held to the float32 model of the same weights, which is served where they do not
        come near it; its compiled step may differ from the modules, row by row, by no more than rounding moved them.
        What agreed at an earlier start, and still answers bit by bit as it did then, agrees.
        """
        parts = parts_of(self._model, self._rotary[0]) if len(self._rotary) == 1 else None
        step = None if parts is None else step_of(parts, self._pages.attention)
        if step is None:
            log.info(
                "no_compiled_step",
                model=type(self._model).__name__,
                reason=why_unknown(self._model) if parts is None else "its weights or pages are of several kinds",
                served_by="transformers' modules, more slowly",
            )
        steps = self._trial_steps()
        if step is None or not self._takes_as_before(step, steps):
            self._take_what_agrees(step, steps)
        self.parts = parts if self._compute is step else None

    def _take_what_agrees(self, step: Compute | None, steps: Sequence[StepBatch]) -> None:
        if is_quantised(self._model):
            self._take_quantised(step, steps)
        elif step is not None:
            difference = partial(_share_of_largest, wanted=self._answers(steps))
            self._agrees("compiled_step_refused", step, steps, difference, _AGREEMENT[self._model.dtype])
        if step is not None and self._compute is step:
            self.remembered.put(AGREED, digest_of(steps, self._answers(steps)))

    def _takes_as_before(self, step: Compute, steps: Sequence[StepBatch]) -> bool:
        """Compute through the step from now on if its answers to the trial are those that were held to the modules."""
        known = self.remembered.get(AGREED)
        if known is None:
            return False
        self._compute = step
        try:
            found = digest_of(steps, self._answers(steps))
        except Exception as error:  # noqa: BLE001 - whatever it is, the modules are there to tell
            found = repr(error)
        if found != known:
            log.warning("compiled_step_changed", model=type(self._model).__name__, remedy="it is checked again")
            self._compute = self._through_transformers
        return bool(found == known)

    def _take_quantised(self, step: Compute | None, steps: Sequence[StepBatch]) -> None:
        with computing_exactly(self._model):
            exact = self._answers(steps)
        difference = partial(_share_of_spread, wanted=exact)
        if not self._agrees(
            "quantisation_refused", self._through_transformers, steps, difference, _QUANTISED_AGREEMENT
        ):
            dequantise(self._model)
        elif step is not None:
            modules = self._answers(steps)
            shares = _shares_of_spread(modules, exact)
            meant = shares <= _ODD
            allowed = min(_TIMES_ROUNDING * float(shares[meant].max()), _ODD)
            difference = partial(_largest_share_of_spread, wanted=modules, rows=meant)
            self._agrees("compiled_step_refused", step, steps, difference, allowed)

    def _agrees(
        self,
        complaint: str,
        compute: Compute,
        steps: Sequence[StepBatch],
        difference: Callable[[torch.Tensor], float],
        allowed: float,
    ) -> bool:
        """Compute so from now on if the difference of its answers is allowed; say so if it is not."""
        self._compute = compute
        allowed = max(allowed, _STORED_AGREEMENT[self._pages.arena.layout.dtype])
        try:
            found = difference(self._answers(steps))
            refused = None if found <= allowed else f"logits differ by {found:.2g}"
        except Exception as error:  # noqa: BLE001 - whatever it is, transformers' own path is there
            refused = repr(error)
        if refused is not None:
            log.warning(complaint, model=type(self._model).__name__, reason=refused)
            self._compute = self._through_transformers
        return refused is None

    def _indices(self, numbers: Int32s) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self._device, torch.long)


def _share_of_largest(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def _share_of_spread(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """That in the middle row; beyond what it may be where more rows are odd than may be."""
    shares = _shares_of_spread(got, wanted).sort().values
    largest = float(shares[-1 - len(shares) // _ROWS_TO_AN_ODD_ONE])
    return max(float(shares.median()), largest * _QUANTISED_AGREEMENT / _ODD)


def _largest_share_of_spread(got: torch.Tensor, wanted: torch.Tensor, rows: torch.Tensor) -> float:
    """The largest in those of the rows that are wanted, bool [rows]."""
    return float(_shares_of_spread(got, wanted)[rows].max())


def _shares_of_spread(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """[rows], the size of the differences beside that of what tells one token's logit from another's.

    Raises:
        ValueError: there is a logit that is no number; no row is so odd.
    """
    shares: torch.Tensor = (got - wanted).norm(dim=1) / (wanted - wanted.mean(1, keepdim=True)).norm(dim=1)
    if not shares.isfinite().all():
        raise ValueError("a logit is no number")
    return shares


def _output_embedding(model: PreTrainedModel) -> torch.nn.Module:
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


class _WantedRows:
    """Lets only the wanted rows through to the output embedding, whatever the architecture does around it."""

    def __init__(self, head: torch.nn.Module) -> None:
        self.rows = torch.zeros(0, dtype=torch.long)
        head.register_forward_pre_hook(self._select)

    def _select(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[0].index_select(1, self.rows), *arguments[1:])
