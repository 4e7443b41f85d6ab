"""One arena for all models that generate together, and what each has of it; runners of transformers' models over that.

The first model is the target: a page is measured by its tokens.  Keys and values of all have one dtype.  Knows nothing about
where models come from, nor who drafts for whom.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import torch
from typing_extensions import Required, Unpack

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.runtime.cpu.attention import CPU_KV_DTYPES, CpuPagedAttention
from helix_gateway.runtime.device import memory_errors_named
from helix_gateway.runtime.groups import LayerUse, group_layers
from helix_gateway.runtime.paged_runner import ModelPages
from helix_gateway.runtime.pages import Arena, lay_out_pages, pages_in
from helix_gateway.runtime.remembered import NothingRemembered, Remembered
from helix_gateway.runtime.torch_attention import TorchPagedAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from helix_gateway.runtime.runner import TransformersRunner

AttentionKind: TypeAlias = type[CpuPagedAttention] | type[TorchPagedAttention]


class ArenaRefusedError(OutOfMemoryError):
    """The device does not give the memory that the pages of all models are to take."""


class PoolOptions(TypedDict, total=False):
    """How the arena of a pool shall be."""

    device: Required[torch.device]
    dtype: Required[torch.dtype]
    """Of keys and values; int8: quantised, with one scale a token and head."""
    block_size: int
    """Tokens of the target's largest KV group in a page; 16 by default."""
    num_pages: int | None
    """Pages of the arena; None: as many as ``kv_memory_bytes`` hold."""
    kv_memory_bytes: int | None
    """Memory that the arena may take, where ``num_pages`` is None."""
    max_tokens: int | None
    """More pages than so many tokens of each model need are never taken, where ``num_pages`` is None."""
    attention: AttentionKind | None
    """How pages lie and are attended over; None: what is fastest on the device."""


def make_runners(
    models: Sequence["PreTrainedModel"],
    *,
    remembered: Sequence[Remembered] | None = None,
    **options: Unpack[PoolOptions],
) -> "list[TransformersRunner]":
    """Runners of some models over one pool of pages, in the models' order.

    Args:
        models: on the pool's device, the target first.
        remembered: what is known of each model; None: nothing.
        options: see `PoolOptions`.

    Raises:
        ModelLoadError: a model does something that paged attention cannot serve.
        OutOfMemoryError: the arena does not fit the device, or not one page fits ``kv_memory_bytes``.
    """
    from helix_gateway.runtime.probe import known_attention_layers
    from helix_gateway.runtime.runner import TransformersRunner

    remembered = remembered or [NothingRemembered() for _ in models]
    probes = [
        known_attention_layers(model.train(mode=False), known) for model, known in zip(models, remembered, strict=True)
    ]
    pages = lay_out_pool([[layer.use for layer in probe.layers] for probe in probes], **options)
    with memory_errors_named():
        return [
            TransformersRunner(model, probe, own, known)
            for model, probe, own, known in zip(models, probes, pages, remembered, strict=True)
        ]


def lay_out_pool(layers: Sequence[Sequence[LayerUse]], **options: Unpack[PoolOptions]) -> list[ModelPages]:
    """One arena, and what each model has of it.

    Args:
        layers: of each model, the target first.
        options: see `PoolOptions`.

    Raises:
        ArenaRefusedError: the arena does not fit the device.
        OutOfMemoryError: not one page fits ``kv_memory_bytes``.
    """
    device, dtype, num_pages = options["device"], options["dtype"], options.get("num_pages")
    names = [f"model{place}" for place in range(len(layers))]
    shapes = [[layer.shape for layer in own] for own in layers]
    groups = [group for name, own in zip(names, shapes, strict=True) for group in group_layers(name, own)]
    layout = lay_out_pages(groups, options.get("block_size", 16), dtype)
    if num_pages is None:
        num_pages = pages_in(layout, options.get("kv_memory_bytes"), options.get("max_tokens"))
    kind = options.get("attention") or device_attention(device, dtype)
    try:
        with memory_errors_named():
            arena = kind.new_arena(layout, num_pages, device)
    except OutOfMemoryError as error:
        raise ArenaRefusedError(str(error)) from error
    with memory_errors_named():
        return [_pages_of(name, kind, arena, own) for name, own in zip(names, layers, strict=True)]


def device_attention(device: torch.device, dtype: torch.dtype) -> AttentionKind:
    """What is fastest on the device: compiled code on a CPU, torch operators elsewhere."""
    return CpuPagedAttention if device.type == "cpu" and dtype in CPU_KV_DTYPES else TorchPagedAttention


def _pages_of(name: str, kind: AttentionKind, arena: Arena, layers: Sequence[LayerUse]) -> ModelPages:
    groups = arena.layout.groups_of(name)
    return ModelPages(arena, groups, kind(arena, groups, [layer.heads for layer in layers]))
