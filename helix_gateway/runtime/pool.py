"""One arena for all models that generate together, and a runner of each over its own groups of it.

The first model is the target: a page is measured by its tokens.  Keys and values of all have one dtype.  Knows nothing about
where models come from, nor who drafts for whom.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from transformers import PreTrainedModel

from helix_gateway.runtime.cpu.attention import CPU_KV_DTYPES, CpuPagedAttention
from helix_gateway.runtime.device import memory_errors_named
from helix_gateway.runtime.groups import group_layers
from helix_gateway.runtime.pages import Arena, lay_out_pages, pages_in
from helix_gateway.runtime.probe import ModelProbe, known_attention_layers
from helix_gateway.runtime.remembered import NothingRemembered, Remembered
from helix_gateway.runtime.runner import ModelPages, TransformersRunner
from helix_gateway.runtime.torch_attention import TorchPagedAttention

AttentionKind: TypeAlias = type[CpuPagedAttention] | type[TorchPagedAttention]


def make_runners(
    models: Sequence[PreTrainedModel],
    *,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int = 16,
    num_pages: int | None = None,
    kv_memory_bytes: int | None = None,
    max_tokens: int | None = None,
    attention: AttentionKind | None = None,
    remembered: Sequence[Remembered] | None = None,
) -> list[TransformersRunner]:
    """Runners of some models over one pool of pages, in the models' order.

    Args:
        models: on ``device``, the target first.
        dtype: of keys and values; int8: quantised, with one scale a token and head.
        block_size: tokens of the target's largest KV group in a page.
        num_pages: pages of the arena; None: as many as ``kv_memory_bytes`` hold.
        kv_memory_bytes: memory that the arena may take, where ``num_pages`` is None.
        max_tokens: more pages than so many tokens of each model need are never taken, where ``num_pages`` is None.
        attention: how pages lie and are attended over; None: what is fastest on the device.
        remembered: what is known of each model; None: nothing.

    Raises:
        ModelLoadError: a model does something that paged attention cannot serve.
        OutOfMemoryError: the arena does not fit the device, or not one page fits ``kv_memory_bytes``.
    """
    remembered = remembered or [NothingRemembered() for _ in models]
    probes = [
        known_attention_layers(model.train(mode=False), known) for model, known in zip(models, remembered, strict=True)
    ]
    names = [f"model{place}" for place in range(len(models))]
    shapes = [[layer.shape for layer in probe.layers] for probe in probes]
    groups = [group for name, own in zip(names, shapes, strict=True) for group in group_layers(name, own)]
    layout = lay_out_pages(groups, block_size, dtype)
    if num_pages is None:
        num_pages = pages_in(layout, kv_memory_bytes, max_tokens)
    kind = attention or device_attention(device, dtype)
    with memory_errors_named():
        arena = kind.new_arena(layout, num_pages, device)
        return [
            TransformersRunner(model, probe, _pages_of(name, kind, arena, probe), known)
            for name, model, probe, known in zip(names, models, probes, remembered, strict=True)
        ]


def device_attention(device: torch.device, dtype: torch.dtype) -> AttentionKind:
    """What is fastest on the device: compiled code on a CPU, torch operators elsewhere."""
    return CpuPagedAttention if device.type == "cpu" and dtype in CPU_KV_DTYPES else TorchPagedAttention


def _pages_of(name: str, kind: AttentionKind, arena: Arena, probe: ModelProbe) -> ModelPages:
    groups = arena.layout.groups_of(name)
    return ModelPages(arena, groups, kind(arena, groups, [layer.heads for layer in probe.layers]))
