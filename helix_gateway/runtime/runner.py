"""A transformers model as the engine's `ModelRunner`: one ragged forward over paged keys and values, on any device.

The flat batch goes through the model as one sequence of ``num_tokens``; what belongs together, attention alone decides
(`paged_attention.py`).  Logits are computed for the wanted rows only.  Knows nothing about requests or schedules.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import structlog
import torch
from transformers import PreTrainedModel

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.core.kv import KVGroup
from helix_gateway.core.step import Int32s, LogprobRows, SamplingRows, StepBatch
from helix_gateway.runtime import paged_attention
from helix_gateway.runtime.context import context_length
from helix_gateway.runtime.cpu.activations import keep_rows_apart
from helix_gateway.runtime.cpu.attention import CPU_KV_DTYPES, CpuPagedAttention
from helix_gateway.runtime.cpu.llama import find_llama_step
from helix_gateway.runtime.groups import group_layers
from helix_gateway.runtime.paged_attention import PagedAttention, PagedLayer
from helix_gateway.runtime.pages import Arena, PageLayout, lay_out_pages, pages_in
from helix_gateway.runtime.probe import AttentionLayer, find_attention_layers
from helix_gateway.runtime.rotary import install_rotary_tables
from helix_gateway.runtime.sampling import make_sampler
from helix_gateway.runtime.torch_attention import TorchPagedAttention

log = structlog.get_logger(__name__)

AttentionMaker = Callable[
    [PageLayout, int, Sequence[AttentionLayer], torch.device, torch.dtype], tuple[Arena, PagedAttention]
]
"""(layout, num_pages, layers, device, dtype) to the arena and what attends over it."""


_AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Largest difference between the compiled step's logits and transformers', as a share of the largest logit."""


class TransformersRunner:
    """`core.protocols.ModelRunner` over a loaded ``ForCausalLM``.

    The model is changed for good: its attention reads the runner's pages, its rotary embeddings become tables,
    and on a CPU its activations keep rows apart.

    Args:
        model: on ``device``, its floating-point weights of ``dtype``, which is also that of keys and values.
        block_size: tokens of the largest KV group in a page.
        num_pages: pages of the arena; None: as many as ``kv_memory_bytes`` hold.
        kv_memory_bytes: memory that the arena may take, where ``num_pages`` is None.
        max_tokens: more pages than so many tokens need are never taken, where ``num_pages`` is None.
        attention: makes the arena and what attends over it.

    Raises:
        ModelLoadError: the model does something that paged attention cannot serve.
        OutOfMemoryError: the arena does not fit the device, or not one page fits ``kv_memory_bytes``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        dtype: torch.dtype,
        block_size: int = 16,
        num_pages: int | None = None,
        kv_memory_bytes: int | None = None,
        max_tokens: int | None = None,
        attention: AttentionMaker | None = None,
    ) -> None:
        model.train(mode=False)
        self._model = model
        self._device = device
        layers, self._vocab_size = find_attention_layers(model)
        layout = lay_out_pages(group_layers([layer.shape for layer in layers]), block_size)
        if num_pages is None:
            num_pages = pages_in(layout, dtype, kv_memory_bytes, max_tokens)
        with _memory_errors_named():
            make = attention or device_attention
            self._arena, self._attention = make(layout, num_pages, layers, device, dtype)
        for number, layer in enumerate(layers):
            paged_attention.attach(layer.module, PagedLayer(self._attention, number))
        model.set_attn_implementation(paged_attention.NAME)
        self.context_length = context_length(model.config)
        """Tokens that one sequence may have."""
        self._rotary = install_rotary_tables(model, self.context_length)
        if device.type == "cpu":
            keep_rows_apart(model)
        self._wanted = _WantedRows(_output_embedding(model))
        self._sampler = make_sampler(device, self._vocab_size)
        self._compute: Callable[[StepBatch], torch.Tensor] = self._through_transformers
        if device.type == "cpu":
            self._take_shortcut()

    @property
    def kv_groups(self) -> Sequence[KVGroup]:
        """See `ModelRunner`."""
        return tuple(group.kv_group for group in self._arena.layout.groups)

    @property
    def num_pages(self) -> int:
        """See `ModelRunner`."""
        return self._arena.num_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, over all layers."""
        return self._arena.layout.page_elements * self._arena.memory.element_size()

    @property
    def vocab_size(self) -> int:
        """See `ModelRunner`."""
        return self._vocab_size

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """See `ModelRunner`."""
        with _memory_errors_named():
            self._arena.copy_pages(copies)

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Logits [num_rows, vocab_size], float32, on the runner's device."""
        with _memory_errors_named(), torch.inference_mode():
            self._attention.begin(batch)
            return self._compute(batch).float()

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
        """Compute through the compiled step from now on, if the model has one that agrees with transformers' own."""
        step = find_llama_step(self._model, self._attention, self._rotary)
        if step is None:
            return
        trial = _trial_batch(self._vocab_size, self.kv_groups)
        wanted = self.forward(trial)
        self._compute = step
        difference = float((self.forward(trial) - wanted).abs().max() / wanted.abs().max())
        if difference > _AGREEMENT[self._model.dtype]:
            log.warning("compiled_step_refused", model=type(self._model).__name__, difference=difference)
            self._compute = self._through_transformers

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> Int32s:
        """See `ModelRunner`."""
        with _memory_errors_named(), torch.inference_mode():
            return self._sampler.sample(logits, rows)

    def logprobs(self, logits: torch.Tensor, logits_index: Int32s, token_ids: Int32s, top: int) -> LogprobRows:
        """See `ModelRunner`."""
        with _memory_errors_named(), torch.inference_mode():
            return self._sampler.logprobs(logits, logits_index, token_ids, top)

    def _indices(self, numbers: Int32s) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self._device, torch.long)


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


def device_attention(
    layout: PageLayout, num_pages: int, layers: Sequence[AttentionLayer], device: torch.device, dtype: torch.dtype
) -> tuple[Arena, PagedAttention]:
    """What is fastest on the device: compiled code on a CPU (torch is then left one thread), torch operators elsewhere."""
    if device.type != "cpu" or dtype not in CPU_KV_DTYPES:
        return torch_attention(layout, num_pages, layers, device, dtype)
    arena = Arena.slice_major(layout, num_pages, dtype)
    attention = CpuPagedAttention(arena, [layer.heads for layer in layers])
    # What torch computes here is small: a team of its own, spinning beside ours, makes a product of 50 µs take 8 ms, and
    # would cut elementwise operators at places that depend on the batch.  Said once compiled code has run: where both
    # use one OpenMP library, numba's start sets the number for torch too.
    torch.set_num_threads(1)
    return arena, attention


def torch_attention(
    layout: PageLayout, num_pages: int, layers: Sequence[AttentionLayer], device: torch.device, dtype: torch.dtype
) -> tuple[Arena, PagedAttention]:
    """Plain torch operators, on any device: the reference."""
    arena = Arena.page_major(layout, num_pages, dtype, device)
    return arena, TorchPagedAttention(arena)


@contextmanager
def _memory_errors_named() -> Iterator[None]:
    """The ways of torch to say that a device is full, as the one error that the engine knows."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(str(error)) from error
    except RuntimeError as error:
        said = str(error).lower()
        if not any(words in said for words in ("out of memory", "not enough memory", "can't allocate memory")):
            raise
        raise OutOfMemoryError(str(error)) from error


def _trial_batch(vocab_size: int, groups: Sequence[KVGroup]) -> StepBatch:
    """A few tokens of one sequence in page 0."""
    count = min(3, *(group.tokens_per_block for group in groups))
    rows = np.arange(count, dtype=np.int32)
    return StepBatch(
        token_ids=(rows * 7919 + 11) % vocab_size,
        positions=rows,
        cu_seqlens=np.array([0, count], np.int32),
        context_lens=np.array([count], np.int32),
        block_tables=tuple(np.zeros((1, 1), np.int32) for _ in groups),
        logits_rows=rows,
    )
