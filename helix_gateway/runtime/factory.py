"""From what an engine is told to load to a runner: the model's weights, packed for the device, over an arena of pages.

The one place that ties loading, products, attention and sampling together.  Knows nothing about requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from typing_extensions import Required, Unpack

from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError
from helix_gateway.runtime.device import free_memory_bytes, get_device
from helix_gateway.runtime.heap import return_freed_blocks, returning_freed_memory
from helix_gateway.runtime.loading import load_model, resolve_dtype
from helix_gateway.runtime.pool import make_runners
from helix_gateway.runtime.runner import TransformersRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KV_SHARE = 0.5
"""Of the memory that is free once the weights are there; the rest is for activations and for everybody else."""
_STEP_TOKENS_CPU = 256
_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class LoadedRunner:
    """A runner and what only the model's configuration knows."""

    runner: TransformersRunner
    context_length: int
    step_tokens: int
    """Tokens computed in one step that suit the device: more make a step longer and hardly more efficient."""


class LoadOptions(TypedDict, total=False):
    """What is the same for all models of a pool."""

    device: str
    """As `get_device` takes it; by default the best there is."""
    dtype: str
    """As `resolve_dtype` takes it; by default "auto", for each model by itself."""
    block_size: int
    """Tokens of the target's largest KV group in a page; 16 by default."""
    kv_cache_memory_bytes: int | None
    """Memory of the pool; by default half of what is free once the weights are there."""
    max_tokens_in_use: Required[int]
    """More KV than for so many tokens of each model is never taken, where the memory is not given."""


def load_runner(path: str, **options: Unpack[LoadOptions]) -> LoadedRunner:
    """Load one model that has the pool to itself; see `load_runners`."""
    (loaded,) = load_runners([path], **options)
    return loaded


def load_runners(paths: Sequence[str], **options: Unpack[LoadOptions]) -> list[LoadedRunner]:
    """Load models that draw pages from one pool, for serving.

    Args:
        paths: GGUF files, or folders in Hugging Face layout; the target first, whose dtype keys and values have.
        options: see `LoadOptions`.

    Raises:
        ModelLoadError: what is wrong with a model, the device or the memory, in one line.
    """
    where = get_device(options.get("device", "auto"))
    dtypes = [resolve_dtype(path, options.get("dtype", "auto")) for path in paths]
    if where.type == "cpu":
        # torch's own team of threads, spinning beside ours, makes a product of 50 µs take 8 ms; it is not even started.
        torch.set_num_threads(1)
    with returning_freed_memory():
        models = [_load_packed(path, where, dtype) for path, dtype in zip(paths, dtypes, strict=True)]
        asked = options.get("kv_cache_memory_bytes")
        memory = asked or int(free_memory_bytes(where) * _KV_SHARE)
        try:
            runners = make_runners(
                models,
                device=where,
                dtype=dtypes[0],
                block_size=options.get("block_size", 16),
                kv_memory_bytes=memory,
                max_tokens=None if asked else options["max_tokens_in_use"],
            )
        except OutOfMemoryError as error:
            raise ModelLoadError(_does_not_fit(memory, where, error)) from error
    step_tokens = _STEP_TOKENS_CPU if where.type == "cpu" else _STEP_TOKENS
    return [LoadedRunner(runner, runner.context_length, step_tokens) for runner in runners]


def _load_packed(path: str, device: torch.device, dtype: torch.dtype) -> "PreTrainedModel":
    model = load_model(path, device=device, dtype=dtype)
    if device.type == "cpu":
        from helix_gateway.runtime.cpu.linear import pack_linears

        return_freed_blocks()
        pack_linears(model)
    return model


def _does_not_fit(asked_bytes: int, device: torch.device, error: OutOfMemoryError) -> str:
    if asked_bytes < free_memory_bytes(device):
        return f"The KV cache does not fit: {error}. Raise --kv-cache-memory."
    return (
        f"A KV cache of {asked_bytes / 2**30:.1f} GiB does not fit: {free_memory_bytes(device) / 2**30:.1f} GiB are free "
        f"once the weights are loaded. Lower --kv-cache-memory."
    )
