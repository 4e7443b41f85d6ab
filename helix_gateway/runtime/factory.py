"""From what an engine is told to load to a runner: the model's weights, packed for the device, over an arena of pages.

The one place that ties loading, products, attention and sampling together.  Knows nothing about requests.
"""

import gc
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import structlog
import torch
from typing_extensions import Required, Unpack

from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError
from helix_gateway.runtime.checkpoints.replaced import with_blocks
from helix_gateway.runtime.compiled_runner import CompiledRunner
from helix_gateway.runtime.cpu.reading import Quantisation
from helix_gateway.runtime.description import Description, Form, described_tensors, forget, read_parts, recall, remember
from helix_gateway.runtime.device import free_memory_bytes, get_device, memory_errors_named
from helix_gateway.runtime.heap import return_freed_blocks, returning_freed_memory
from helix_gateway.runtime.kept_blocks import NamedBlocks
from helix_gateway.runtime.kv_format import kv_dtype
from helix_gateway.runtime.loading import load_model, open_checkpoint, quantisation_of, resolve_dtype
from helix_gateway.runtime.paged_runner import PagedRunner
from helix_gateway.runtime.pool import ArenaRefusedError, PoolOptions, lay_out_pool, make_runners
from helix_gateway.runtime.progress import terminal_bar
from helix_gateway.runtime.promises import NotQuantisableError, Promises
from helix_gateway.runtime.remembered import (
    NothingRemembered,
    Remembered,
    file_identities,
    remembered_folder,
    surroundings,
)
from helix_gateway.runtime.weight_room import WeightRoom, Weights, is_ample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from helix_gateway.runtime.runner import TransformersRunner

log = structlog.get_logger(__name__)

QuantizationName: TypeAlias = Literal["auto", "int8", "int4", "none"]

_KV_SHARE = 0.5
"""Of the memory that is free once the weights are there; the rest is for activations and for everybody else."""
_STEP_TOKENS_CPU = 256
_STEP_TOKENS = 2048
_TOLD_APART = {"dtype": "auto", "quantization": "auto", "kv_cache_dtype": "auto", "block_size": 16}
"""Options under which different things are found out, with what they are where nobody says."""
_MODULES = "modules"


@dataclass(frozen=True, slots=True)
class LoadedRunner:
    """A runner and what only the model's configuration knows."""

    runner: PagedRunner
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
    sample_ids: Callable[[str], Sequence[int]] | None
    """Tokens of some text, as the tokenizer of the model at a path has them; float models that become int4 are rounded for
    it beside text of their own, and for that alone where there is none."""
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
    # Told before anything is read.
    resolve_quantisation(where, options.get("dtype", "auto"), options.get("quantization", "auto"))
    if where.type == "cpu":
        # torch's own team of threads, spinning beside ours, makes a product of 50 µs take 8 ms; it is not even started.
        torch.set_num_threads(1)
    if not is_ample(paths, where):
        _room(paths, where, options).check()
    models = [_Wanted(path, _kept_blocks(path, where, options)) for path in paths]
    try:
        runners = _loaded_or_recalled(models, where, options)
        step_tokens = _STEP_TOKENS_CPU if where.type == "cpu" else _STEP_TOKENS
        return [LoadedRunner(runner, runner.context_length, step_tokens) for runner in runners]
    except OutOfMemoryError as error:
        # Pages that do not fit what was given for them are counted; whoever asks the system in vain has its error.
        asked, was_asked_in_vain = options.get("kv_cache_memory_bytes"), error.__cause__ is not None
        told, are_pages_refused = str(error), isinstance(error, ArenaRefusedError)
    # Only now, without the error: its traceback holds all that was read.
    gc.collect()
    return_freed_blocks()
    if are_pages_refused and not (asked and asked >= free_memory_bytes(where)):
        # Without the weights there may be enough; how much was free beside them nobody knows any more.
        raise ModelLoadError("The KV cache does not fit beside the weights: give it less with --kv-cache-memory.")
    if was_asked_in_vain and not (asked and asked >= free_memory_bytes(where)):
        raise _room(paths, where, options).run_out()
    raise ModelLoadError(_does_not_fit(_kv_memory_bytes(where, options), where, told))


def _loaded_or_recalled(
    models: Sequence["_Wanted"], device: torch.device, options: LoadOptions
) -> Sequence[PagedRunner]:
    known = _remembered(models, device, options)
    with returning_freed_memory():
        return _recalled(models, known, device, options) or _loaded(models, known, device, options)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A model that is to be loaded."""

    path: str
    kept: NamedBlocks | None
    """What its matrices have been rounded to, if anything."""


def _room(paths: Sequence[str], device: torch.device, options: LoadOptions) -> WeightRoom:
    """The models' weights beside the memory for them, and how else these could be held."""
    dtype, requested = options.get("dtype", "auto"), options.get("quantization", "auto")
    quantisation = resolve_quantisation(device, dtype, requested)
    forms = [
        (
            Form("float32", quantisation_of(path, quantisation))
            if quantisation
            else _float_form(resolve_dtype(path, dtype))
        )
        for path in paths
    ]
    others = {"--dtype bfloat16": _float_form(torch.bfloat16)}
    if device.type == "cpu":
        instead = " without --dtype bfloat16" if dtype == "bfloat16" else ""
        others = {
            f"--quantization int8{instead}": Form("float32", "int8"),
            f"--quantization int4{instead}": Form("float32", "int4"),
        }
    return WeightRoom([Weights(path, form) for path, form in zip(paths, forms, strict=True)], device, others)


def _float_form(dtype: torch.dtype) -> Form:
    return Form("bfloat16" if dtype == torch.bfloat16 else "float32", None)


def _kept_blocks(path: str, device: torch.device, options: LoadOptions) -> NamedBlocks | None:
    """A float model's matrices in four bits, where these are asked for and can be had."""
    quantisation = resolve_quantisation(device, options.get("dtype", "auto"), options.get("quantization", "auto"))
    if quantisation != "int4" or not Path(path).is_dir():
        return None
    from helix_gateway.runtime.four_bit_model import TEXT_TOKENS, four_bits_of

    def load_int8(path: str) -> PagedRunner:
        return load_runner(path, device="cpu", quantization="int8", max_tokens_in_use=TEXT_TOKENS).runner

    return four_bits_of(path, load_int8, options.get("sample_ids"))


def _recalled(
    models: Sequence[_Wanted], known: Sequence[Remembered], device: torch.device, options: LoadOptions
) -> Sequence[PagedRunner] | None:
    """Runners as an earlier start has written them down, without transformers; None where that cannot be."""
    try:
        descriptions = [_recalled_description(each) for each in known]
        if None in descriptions:
            return None
        return _described_runners(models, known, [each for each in descriptions if each], device, options)
    except OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the files are there to tell
        log.warning(
            "quick_start_failed",
            models=[each.path for each in models],
            reason=f"{type(error).__name__}: {error}",
            remedy="checked again",
        )
        for each in known:
            forget(each)  # should nothing be written down in its place, no later start is to fail by it again
    # Only now, without the error: its traceback holds all that was read.
    gc.collect()
    return_freed_blocks()
    return None


def _recalled_description(known: Remembered) -> Description | None:
    """What is written down of a model, if transformers' sources are those that it was held to."""
    return recall(known) if _are_as_they_were(known.get(_MODULES)) else None


def _described_runners(
    models: Sequence[_Wanted],
    known: Sequence[Remembered],
    descriptions: Sequence[Description],
    device: torch.device,
    options: LoadOptions,
) -> list[CompiledRunner]:
    parts = []
    for model, description in zip(models, descriptions, strict=True):
        tensors = with_blocks(described_tensors(description, open_checkpoint(model.path)), model.kept)
        with (
            terminal_bar(
                f"Loading {Path(model.path).name}", sum(tensor.nbytes for tensor in tensors.values())
            ) as report,
            memory_errors_named(),
        ):
            parts.append(read_parts(description, tensors, report))
    pages = lay_out_pool([each.uses for each in descriptions], **_pool_options(device, options, descriptions[0].form))
    with memory_errors_named():
        return [
            CompiledRunner(
                own, its, vocab_size=each.vocab_size, context_length=each.context_length, remembered=remembered
            )
            for own, its, each, remembered in zip(parts, pages, descriptions, known, strict=True)
        ]


def _loaded(
    models: Sequence[_Wanted], known: Sequence[Remembered], device: torch.device, options: LoadOptions
) -> Sequence[PagedRunner]:
    """Runners of transformers' models; what these turn out to be is written down for the next start."""
    dtype, requested = options.get("dtype", "auto"), options.get("quantization", "auto")
    quantisation = resolve_quantisation(device, dtype, requested)
    if quantisation is None:
        loaded = [_load_packed(each.path, device, resolve_dtype(each.path, dtype)) for each in models]
    elif requested == "auto":
        loaded = [_load_quantised_or_packed(each, device, quantisation) for each in models]
    else:
        loaded = [_load_quantised(each, device, quantisation) for each in models]
    for each, own in zip(loaded, known, strict=True):
        own.hold_to(_MODULES, _modules_of(each.model))
    pool = _pool_options(device, options, loaded[0].form)
    runners = make_runners([each.model for each in loaded], remembered=known, **pool)
    if device.type == "cpu":
        for wanted, runner, each in zip(models, runners, loaded, strict=True):
            _write_down(wanted.path, runner, each.form)
    return runners


def _write_down(path: str, runner: "TransformersRunner", form: Form) -> None:
    from helix_gateway.runtime.describing import describe

    try:
        description = describe(runner, form, open_checkpoint(path))
    except Exception as error:  # noqa: BLE001 - whatever it is, the model is loaded, and the next start does it again
        log.info("not_written_down", model=path, reason=f"{type(error).__name__}: {error}")
        return
    if description is not None:
        remember(description, runner.remembered)


def _pool_options(device: torch.device, options: LoadOptions, target: Form) -> PoolOptions:
    """``target``: what the target's weights are held in."""
    asked, kv = options.get("kv_cache_memory_bytes"), options.get("kv_cache_dtype", "auto")
    return PoolOptions(
        device=device,
        dtype=kv_dtype(kv) or _kv_beside(target, options.get("dtype", "auto")),
        block_size=options.get("block_size", 16),
        kv_memory_bytes=_kv_memory_bytes(device, options),
        max_tokens=None if asked else options["max_tokens_in_use"],
    )


def _kv_memory_bytes(device: torch.device, options: LoadOptions) -> int:
    return options.get("kv_cache_memory_bytes") or int(free_memory_bytes(device) * _KV_SHARE)


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
    form: Form


def _kv_beside(target: Form, dtype: str) -> torch.dtype:
    """What keys and values are stored in where nobody says so; a dtype that was asked for is meant for them too."""
    return torch.int8 if target.quantisation is not None and dtype == "auto" else target.torch_dtype


def _load_quantised_or_packed(wanted: _Wanted, device: torch.device, quantisation: Quantisation) -> _LoadedModel:
    """Quantised where that can be, since nobody asked for it by name; else as its file has it, and said so."""
    path = wanted.path
    try:
        return _load_quantised(wanted, device, quantisation)
    except NotQuantisableError as error:
        log.warning("not_quantised", model=path, reason=str(error))
    # Only now, without the error: its traceback holds all that was read.
    gc.collect()
    return_freed_blocks()
    return _load_packed(path, device, resolve_dtype(path, "auto"))


def _load_quantised(wanted: _Wanted, device: torch.device, quantisation: Quantisation) -> _LoadedModel:
    from helix_gateway.runtime.cpu.quantising import quantise_model

    # Kept blocks are taken as a file's own; what there is none of, a table of tokens, becomes int8 in groups in both ways.
    form = Form("float32", quantisation_of(wanted.path, quantisation) if wanted.kept is None else "file")

    def quantise(model: "PreTrainedModel", promises: Promises) -> None:
        quantise_model(model, form.quantisation, promises)  # type: ignore[arg-type]

    # What is rounded to int8 is float32 before and after.
    model = load_model(wanted.path, device=device, dtype=torch.float32, quantise=quantise, kept=wanted.kept)
    return _LoadedModel(model, form)


def _load_packed(path: str, device: torch.device, dtype: torch.dtype) -> _LoadedModel:
    model = load_model(path, device=device, dtype=dtype)
    if device.type == "cpu":
        from helix_gateway.runtime.cpu.packing import pack_linears

        return_freed_blocks()
        with memory_errors_named():
            pack_linears(model)
    return _LoadedModel(model, _float_form(dtype))


def _remembered(models: Sequence[_Wanted], device: torch.device, options: LoadOptions) -> list[Remembered]:
    """What is known of each model as it is served here; of other devices than CPUs nothing is remembered."""
    if device.type != "cpu":
        return [NothingRemembered() for _ in models]
    settings = [options.get(name, default) for name, default in _TOLD_APART.items()]
    # Models of one pool share its pages: how these lie is the target's affair.
    files = [file_identities(each.path) for each in models]
    around = {"target": files[0], "settings": settings, **surroundings()}
    return [
        Remembered(
            {"place": place, "files": own, "rounded": each.kept and each.kept.digest, **around}, remembered_folder()
        )
        for place, (each, own) in enumerate(zip(models, files, strict=True))
    ]


def _modules_of(model: "PreTrainedModel") -> list[Any]:
    """transformers' own sources of a model, should they be edited in place, and what they make of its files."""
    sources = [inspect.getfile(kind) for kind in (type(model), type(model.config))]
    return [[[source, file_identities(source)] for source in sources], model.config.to_json_string(use_diff=False)]


def _are_as_they_were(modules: Any) -> bool:
    return modules is not None and all(file_identities(source) == known for source, known in modules[0])


def _does_not_fit(asked_bytes: int, device: torch.device, told: str) -> str:
    if asked_bytes < free_memory_bytes(device):
        return f"The KV cache does not fit: {told}. Raise --kv-cache-memory."
    return (
        f"A KV cache of {asked_bytes / 2**30:.1f} GiB does not fit: {free_memory_bytes(device) / 2**30:.1f} GiB are free "
        f"once the weights are loaded. Lower --kv-cache-memory."
    )
