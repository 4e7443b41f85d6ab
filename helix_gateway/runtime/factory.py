"""From what an engine is told to load to a runner: the model's weights, packed for the device, over an arena of pages.

The one place that ties loading, products, attention and sampling together.  Knows nothing about requests.
"""

from dataclasses import dataclass

import torch

from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError
from helix_gateway.runtime.device import free_memory_bytes, get_device
from helix_gateway.runtime.heap import returning_freed_memory
from helix_gateway.runtime.loading import load_model, resolve_dtype
from helix_gateway.runtime.runner import TransformersRunner

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


def load_runner(
    path: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    block_size: int = 16,
    kv_cache_memory_bytes: int | None = None,
    max_tokens_in_use: int,
) -> LoadedRunner:
    """Load a model for serving.

    Args:
        path: a GGUF file or a folder in Hugging Face layout.
        max_tokens_in_use: more KV than for so many tokens is never taken, where the memory is not given.

    Raises:
        ModelLoadError: what is wrong with the model, the device or the memory, in one line.
    """
    where = get_device(device)
    wanted = resolve_dtype(path, dtype)
    if where.type == "cpu":
        # torch's own team of threads, spinning beside ours, makes a product of 50 µs take 8 ms; it is not even started.
        torch.set_num_threads(1)
    with returning_freed_memory():
        model = load_model(path, device=where, dtype=wanted)
        if where.type == "cpu":
            from helix_gateway.runtime.cpu.linear import pack_linears

            pack_linears(model)
        memory = kv_cache_memory_bytes or int(free_memory_bytes(where) * _KV_SHARE)
        try:
            runner = TransformersRunner(
                model,
                device=where,
                dtype=wanted,
                block_size=block_size,
                kv_memory_bytes=memory,
                max_tokens=None if kv_cache_memory_bytes else max_tokens_in_use,
            )
        except OutOfMemoryError as error:
            raise ModelLoadError(_does_not_fit(memory, where, error)) from error
    return LoadedRunner(runner, runner.context_length, _STEP_TOKENS_CPU if where.type == "cpu" else _STEP_TOKENS)


def _does_not_fit(asked_bytes: int, device: torch.device, error: OutOfMemoryError) -> str:
    if asked_bytes < free_memory_bytes(device):
        return f"The KV cache does not fit: {error}. Raise --kv-cache-memory."
    return (
        f"A KV cache of {asked_bytes / 2**30:.1f} GiB does not fit: {free_memory_bytes(device) / 2**30:.1f} GiB are free "
        f"once the weights are loaded. Lower --kv-cache-memory."
    )
