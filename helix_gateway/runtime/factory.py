"""From what an engine is told to load to a runner: the model's weights, packed for the device, over an arena of pages.

The one place that ties loading, products, attention and sampling together.  Knows nothing about requests.
"""

import gc
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

import structlog
import torch
from typing_extensions import Required, Unpack

from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError
from helix_gateway.runtime.device import free_memory_bytes, get_device
from helix_gateway.runtime.heap import return_freed_blocks, returning_freed_memory
from helix_gateway.runtime.kv_format import kv_dtype
from helix_gateway.runtime.loading import load_model, resolve_dtype
from helix_gateway.runtime.pool import make_runners
from helix_gateway.runtime.promises import NotQuantisableError, Promises
from helix_gateway.runtime.remembered import (
    NothingRemembered,
    Remembered,
    file_identities,
    remembered_folder,
    surroundings,
)
from helix_gateway.runtime.runner import TransformersRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = structlog.get_logger(__name__)

QuantizationName: TypeAlias = Literal["auto", "int8", "int4", "none"]
Quantisation: TypeAlias = Literal["file", "int8", "int4"]

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
    quantization: QuantizationName
    """As `resolve_quantisation` takes it; "auto" by default."""
    kv_cache_dtype: str
    """As `kv_format.kv_dtype` takes it; by default "auto": the dtype that is asked for; where none is, int8 beside
    quantised weights of the target, and its weights' own dtype beside others."""
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
        paths: GGUF files, or folders in Hugging Face layout; the target first.
        options: see `LoadOptions`.

    Raises:
        ModelLoadError: what is wrong with a model, the device or the memory, in one line.
    """
    where = get_device(options.get("device", "auto"))
    dtype = options.get("dtype", "auto")
    requested = options.get("quantization", "auto")
    quantisation = resolve_quantisation(where, dtype, requested)
    stored = kv_dtype(options.get("kv_cache_dtype", "auto"))
    if where.type == "cpu":
        # torch's own team of threads, spinning beside ours, makes a product of 50 µs take 8 ms; it is not even started.
        torch.set_num_threads(1)
    with returning_freed_memory():
        if quantisation is None:
            loaded = [_load_packed(path, where, resolve_dtype(path, dtype)) for path in paths]
        elif requested == "auto":
            loaded = [_load_quantised_or_packed(path, where, quantisation) for path in paths]
        else:
            loaded = [_load_quantised(path, where, quantisation) for path in paths]
        models = [each.model for each in loaded]
        stored = stored or _kv_beside(loaded[0], dtype)
        asked = options.get("kv_cache_memory_bytes")
        memory = asked or int(free_memory_bytes(where) * _KV_SHARE)
        try:
            runners = make_runners(
                models,
                device=where,
                dtype=stored,
                block_size=options.get("block_size", 16),
                kv_memory_bytes=memory,
                max_tokens=None if asked else options["max_tokens_in_use"],
                remembered=_remembered(
                    paths, models, where, [quantisation, str(stored), options.get("block_size", 16)]
                ),
            )
        except OutOfMemoryError as error:
            raise ModelLoadError(_does_not_fit(memory, where, error)) from error
    step_tokens = _STEP_TOKENS_CPU if where.type == "cpu" else _STEP_TOKENS
    return [LoadedRunner(runner, runner.context_length, step_tokens) for runner in runners]


def resolve_quantisation(device: torch.device, dtype: str, requested: QuantizationName) -> Quantisation | None:
    """How weights are quantised, None where they are not.

    ``auto`` quantises on a CPU, where no dtype is asked for: a GGUF's own blocks where there are kernels for them,
    else int8.

    Raises:
        ModelLoadError: it is asked for where it cannot be had.
    """
    if requested == "none":
        return None
    if requested == "auto":
        return "file" if device.type == "cpu" and dtype == "auto" else None
    if device.type != "cpu":
        raise ModelLoadError(f"--quantization {requested} is for CPUs, and this is {device.type}: leave it out.")
    if dtype == "bfloat16":
        raise ModelLoadError(f"--quantization {requested} computes in float32: leave --dtype bfloat16 out.")
    return requested


@dataclass(frozen=True, slots=True)
class _LoadedModel:
    model: "PreTrainedModel"
    dtype: torch.dtype
    """What it computes in."""
    is_quantised: bool


def _kv_beside(target: _LoadedModel, dtype: str) -> torch.dtype:
    """What keys and values are stored in where nobody says so; a dtype that was asked for is meant for them too."""
    return torch.int8 if target.is_quantised and dtype == "auto" else target.dtype


def _load_quantised_or_packed(path: str, device: torch.device, quantisation: Quantisation) -> _LoadedModel:
    """Quantised where that can be, since nobody asked for it by name; else as its file has it, and said so."""
    try:
        return _load_quantised(path, device, quantisation)
    except NotQuantisableError as error:
        log.warning("not_quantised", model=path, reason=str(error))
    # Only now, without the error: its traceback holds all that was read.
    gc.collect()
    return_freed_blocks()
    return _load_packed(path, device, resolve_dtype(path, "auto"))


def _load_quantised(path: str, device: torch.device, quantisation: Quantisation) -> _LoadedModel:
    from helix_gateway.runtime.cpu.quantising import quantise_model

    def quantise(model: "PreTrainedModel", promises: Promises) -> None:
        quantise_model(model, quantisation, promises)

    # What is rounded to int8 is float32 before and after.
    model = load_model(path, device=device, dtype=torch.float32, quantise=quantise)
    return _LoadedModel(model, torch.float32, is_quantised=True)


def _load_packed(path: str, device: torch.device, dtype: torch.dtype) -> _LoadedModel:
    model = load_model(path, device=device, dtype=dtype)
    if device.type == "cpu":
        from helix_gateway.runtime.cpu.linear import pack_linears

        return_freed_blocks()
        pack_linears(model)
    return _LoadedModel(model, dtype, is_quantised=False)


def _remembered(
    paths: Sequence[str], models: Sequence["PreTrainedModel"], device: torch.device, settings: Sequence[object]
) -> list[Remembered]:
    """What is known of each model as it is served here; of other devices than CPUs nothing is remembered."""
    if device.type != "cpu":
        return [NothingRemembered() for _ in models]
    around = surroundings()
    circumstances = [
        {
            "files": file_identities(path),
            # transformers' own sources, should they have been edited in place.
            "modules": [type(model).__name__, file_identities(inspect.getfile(type(model)))],
            "config": model.config.to_json_string(use_diff=False),
            "dtype": str(model.dtype),
            "settings": settings,
            **around,
        }
        for path, model in zip(paths, models, strict=True)
    ]
    # Models of one pool share its pages: how these lie is the target's affair.
    pool = [{"place": place, "target": circumstances[0]["files"], **own} for place, own in enumerate(circumstances)]
    return [Remembered(own, remembered_folder()) for own in pool]


def _does_not_fit(asked_bytes: int, device: torch.device, error: OutOfMemoryError) -> str:
    if asked_bytes < free_memory_bytes(device):
        return f"The KV cache does not fit: {error}. Raise --kv-cache-memory."
    return (
        f"A KV cache of {asked_bytes / 2**30:.1f} GiB does not fit: {free_memory_bytes(device) / 2**30:.1f} GiB are free "
        f"once the weights are loaded. Lower --kv-cache-memory."
    )
