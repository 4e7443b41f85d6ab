"""Attention over pages in plain torch operators: the path of every device without kernels, and the others' reference.

Pages are gathered by index, sequences padded to one another, products batched: only operators that DirectML registers
(`compat_tests/runtime/test_directml_operators.py`).  Sequences with few rows go together, those with many one by one,
so that a prefill chunk does not widen everybody's rows.

Within a unit (see `pages.py`) a token is consecutive: its keys [kv_heads, key_dim], then its values; in int8, the scales
of all heads' keys and of all heads' values before them.  Knows nothing about models or requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from helix_gateway.core.step import Int32s, StepBatch
from helix_gateway.runtime.groups import LayerShape
from helix_gateway.runtime.kv_format import SCALE_BYTES, TOP, padded, token_elements
from helix_gateway.runtime.pages import Arena, GroupLayout, Int64s

# Rows of a sequence up to which it is padded to others: plain decodes and verify windows.
_FEW_ROWS = 16


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Some sequences of one step, padded to one another."""

    rows: torch.Tensor
    """[sequences * longest], rows of the flat batch; padding repeats row 0."""
    pages: torch.Tensor
    """[sequences * blocks]"""
    mask: torch.Tensor
    """[sequences, 1, 1, longest, tokens of the blocks], 0 or -inf."""


@dataclass(frozen=True, slots=True)
class _GroupStep:
    """One step's indices for one KV group."""

    slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """(page, run, place in the unit) of each row's token, [num_tokens] each."""
    buckets: list[_Bucket]
    order: torch.Tensor
    """[num_tokens], where each row stands among the buckets' rows."""


class TorchPagedAttention:
    """`PagedAttention` over a page-major arena on any device, in int8 or any floating-point dtype."""

    new_arena = staticmethod(Arena.page_major)

    def __init__(self, arena: Arena, groups: Sequence[GroupLayout], heads: Sequence[int]) -> None:
        """The pages of ``groups``, the model's own among the arena's; how many ``heads`` ask, each query shows."""
        self._device = arena.memory.device
        self._groups = tuple(groups)
        self._layers: dict[int, tuple[int, torch.Tensor]] = {}
        """For each layer its group, and its part of the arena: [num_pages, runs, unit_tokens, elements of a token]."""
        for number, layout in enumerate(self._groups):
            for place, layer in enumerate(layout.group.layers):
                self._layers[layer] = (number, _layer_view(arena, layout, place))
        self._steps: list[_GroupStep] = []

    def begin(self, batch: StepBatch) -> None:
        """Work out on the host which pages each row writes and reads, and move that to the device."""
        self._steps = [
            _plan_group(batch, tables, layout, self._device)
            for tables, layout in zip(batch.block_tables, self._groups, strict=True)
        ]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """See `PagedAttention.attend`."""
        number, stored = self._layers[layer]
        step, shape = self._steps[number], self._groups[number].group.shape
        rows = query.shape[2]
        new_keys, new_values = (tensor[0].transpose(0, 1) for tensor in (key, value))
        stored.index_put_(step.slots, _stored_rows(new_keys, new_values, stored.dtype))
        flat = query[0].transpose(0, 1).reshape(rows, -1)
        outputs = []
        for bucket in step.buckets:
            count, longest = bucket.mask.shape[0], bucket.mask.shape[3]
            q = flat.index_select(0, bucket.rows).view(count, longest, shape.kv_heads, -1, shape.key_dim)
            tokens = stored.index_select(0, bucket.pages).view(count, -1, stored.shape[-1])
            keys, values = _read_tokens(tokens, shape, query.dtype)
            outputs.append(_attend_bucket(q, keys, values, bucket.mask, scaling, softcap))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined.index_select(0, step.order).view(1, rows, query.shape[1], shape.value_dim).to(query.dtype)


def _layer_view(arena: Arena, layout: GroupLayout, place: int) -> torch.Tensor:
    offsets = arena.unit_offsets(layout)[place]
    run_stride = int(offsets[1] - offsets[0]) if layout.runs > 1 else 0
    element = token_elements(layout.group.shape, layout.dtype)
    size = (arena.num_pages, layout.runs, layout.unit_tokens, element)
    return arena.memory.as_strided(size, (arena.page_stride, run_stride, element, 1), int(offsets[0]))


def _stored_rows(keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """New tokens [rows, elements of a token] as they are stored; keys and values come as [rows, kv_heads, dim]."""
    if dtype != torch.int8:
        return torch.cat([keys.flatten(1), values.flatten(1)], 1).to(dtype)
    (key_bytes, key_scales), (value_bytes, value_scales) = _quantised(keys), _quantised(values)
    scales = torch.cat([key_scales, value_scales], 1).contiguous().view(torch.int8)
    return torch.cat([scales, key_bytes, value_bytes], 1)


def _quantised(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [rows, kv_heads * padded dim] and scales [rows, kv_heads] of [rows, kv_heads, dim] (see `kv_format.py`)."""
    numbers = numbers.float()
    largest = numbers.abs().amax(2, keepdim=True)
    inverse = torch.where(largest > 0, TOP / largest, 0.0)
    rounded = torch.round(numbers * inverse).to(torch.int8)
    dim = numbers.shape[2]
    return nn.functional.pad(rounded, (0, padded(dim) - dim)).flatten(1), (largest / TOP)[:, :, 0]


def _read_tokens(tokens: torch.Tensor, shape: LayerShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, [sequences, tokens, kv_heads * dim] each, of tokens as they are stored."""
    heads = shape.kv_heads
    if tokens.dtype != torch.int8:
        keys, values = tokens.to(dtype).tensor_split([heads * shape.key_dim], 2)
        return keys, values
    at_keys = 2 * heads * SCALE_BYTES
    at_values = at_keys + heads * padded(shape.key_dim)
    scales, key_bytes, value_bytes = tokens.tensor_split([at_keys, at_values], 2)
    factors = scales.contiguous().view(torch.float32).view(*scales.shape[:2], 2, heads, 1)
    return (
        _widened(key_bytes, factors[:, :, 0], shape.key_dim).to(dtype),
        _widened(value_bytes, factors[:, :, 1], shape.value_dim).to(dtype),
    )


def _widened(stored: torch.Tensor, factors: torch.Tensor, dim: int) -> torch.Tensor:
    """Numbers [sequences, tokens, kv_heads * dim] of bytes and their heads' scales [sequences, tokens, kv_heads, 1]."""
    by_head = stored.reshape(*factors.shape[:3], -1)
    return (by_head[..., :dim].float() * factors).flatten(2)


def _attend_bucket(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Query [sequences, longest, kv_heads, group, key_dim], keys and values [sequences, tokens, kv_heads * dim]."""
    count, longest, heads, group, depth = query.shape
    span = keys.shape[1]
    q = query.permute(0, 2, 3, 1, 4).reshape(count * heads, group * longest, depth)
    k = keys.view(count, span, heads, depth).permute(0, 2, 3, 1).reshape(count * heads, depth, span)
    v = values.view(count, span, heads, -1).transpose(1, 2).reshape(count * heads, span, -1)
    scores = torch.bmm(q, k).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores.view(count, heads, group, longest, span) + mask, -1)
    out = torch.bmm(weights.view(count * heads, group * longest, span).to(v.dtype), v)
    return out.view(count, heads, group, longest, -1).permute(0, 3, 1, 2, 4).reshape(count * longest, -1)


def _plan_group(batch: StepBatch, tables: Int32s, layout: GroupLayout, device: torch.device) -> _GroupStep:
    lengths = np.diff(batch.cu_seqlens)
    blocks, inside = np.divmod(batch.positions, layout.tokens_per_block)
    pages = tables[np.repeat(np.arange(len(lengths)), lengths), blocks]
    few = np.flatnonzero(lengths <= _FEW_ROWS)
    members = [few] if len(few) else []
    members += [np.array([number]) for number in np.flatnonzero(lengths > _FEW_ROWS)]
    buckets, order, taken = [], np.zeros(len(batch.positions), np.int64), 0
    for sequences in members:
        rows, real = _padded_rows(batch, sequences)
        buckets.append(_fill_bucket(batch, tables, layout, sequences, rows, device))
        order[rows[real]] = taken + np.flatnonzero(real)
        taken += rows.size
    slots = (pages, inside // layout.unit_tokens, inside % layout.unit_tokens)
    moved = [_to_device(numbers, device) for numbers in (*slots, order)]
    return _GroupStep((moved[0], moved[1], moved[2]), buckets, moved[3])


def _padded_rows(batch: StepBatch, sequences: Int64s) -> tuple[Int64s, npt.NDArray[np.bool_]]:
    """Rows of some sequences [sequences, longest], the last one repeated as padding, and which are real."""
    starts, ends = batch.cu_seqlens[sequences][:, None], batch.cu_seqlens[sequences + 1][:, None]
    rows = starts + np.arange((ends - starts).max())
    return np.minimum(rows, ends - 1).astype(np.int64), rows < ends


def _fill_bucket(
    batch: StepBatch,
    tables: Int32s,
    layout: GroupLayout,
    sequences: Int64s,
    rows: Int64s,
    device: torch.device,
) -> _Bucket:
    """The pages that the sequences' rows see, from each one's first block in the window on, and who sees which token."""
    per_block, window = layout.tokens_per_block, layout.group.shape.window
    positions = batch.positions[rows].astype(np.int64)
    first = np.zeros(len(sequences), np.int64)
    if window is not None:
        first = np.maximum(0, positions.min(1) - window + 1) // per_block
    count = int(((batch.context_lens[sequences] - 1) // per_block - first).max()) + 1
    numbers = first[:, None] + np.arange(count)
    pages = np.take_along_axis(tables[sequences], np.minimum(numbers, tables.shape[1] - 1), 1)
    keys = first[:, None] * per_block + np.arange(count * per_block)
    distance = positions[:, :, None] - keys[:, None, :]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    mask = np.where(seen, np.float32(0), np.float32(-np.inf))[:, None, None]
    return _Bucket(
        _to_device(rows.ravel(), device), _to_device(pages.ravel(), device), torch.from_numpy(mask).to(device)
    )


def _to_device(numbers: Int64s | Int32s, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, np.int64)).to(device)
