"""From a local path to a transformers model on a device, each weight read once.

The model is built on the meta device, its weights are read one by one, converted one by one, and each becomes its
parameter, so that the peak is about the weights' own size.  Building, renaming of older checkpoints' keys, fusing,
tying and the buffers that no file holds are transformers' own, through its public ``from_pretrained(state_dict=)``:
what it is given are not tensors but objects that read theirs when indexed with ``...``, as safetensors' slices do.
Knows nothing about where a path came from, nor what the model is for.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError
from helix_gateway.runtime.checkpoints.protocol import Blocks, Checkpoint, StoredSize, StoredTensor
from helix_gateway.runtime.checkpoints.replaced import KeptBlocks, with_blocks
from helix_gateway.runtime.device import memory_errors_named
from helix_gateway.runtime.progress import Progress, Report, terminal_bar
from helix_gateway.runtime.promises import Promises

if TYPE_CHECKING:
    from types import EllipsisType

    from transformers import PreTrainedConfig, PreTrainedModel

    from helix_gateway.runtime.cpu.reading import Quantisation

Quantise: TypeAlias = Callable[["PreTrainedModel", Promises], None]
"""Reads the matrices that a model's parameters only stand for, and puts what becomes of them in their places."""

_SHOWN = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What transformers says of a checkpoint's keys, and how we put it.
_COMPLAINTS = (
    ("missing_keys", "lacks the weights"),
    ("mismatched_keys", "has weights of the wrong shape:"),
    ("unexpected_keys", "holds weights that its architecture has no use for:"),
)


def load_model(
    path: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantise: Quantise | None = None,
    kept: KeptBlocks | None = None,
    progress: Progress = terminal_bar,
) -> "PreTrainedModel":
    """Return a transformers causal language model in eval mode.

    Args:
        path: a GGUF file, or a folder in Hugging Face layout with safetensors.
        device: where the parameters shall lie.
        dtype: of the parameters; None: as `resolve_dtype` chooses.
        attn_implementation: the name under which attention is registered with transformers; None: its default.
        quantise: the matrices are not read with the rest, but by this; on a CPU only, in float32.
        kept: blocks that are taken for the files' own.
        progress: shown while the weights are read, matrices too.

    Raises:
        ModelLoadError: missing, damaged, incomplete, or of a kind that is not served; the message is one line.
        OutOfMemoryError: there is no room for its weights.
    """
    with _explained(path):
        checkpoint = open_checkpoint(path)
        config = checkpoint.config()
        model_class = _model_class(path, config)
        stored = with_blocks(checkpoint.tensors(lambda: _parameter_names(model_class, config)), kept)
        wanted = _auto_dtype(checkpoint) if dtype is None else dtype
        options: dict[str, Any] = {"dtype": wanted}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        with progress(f"Loading {Path(path).name}", sum(tensor.nbytes for tensor in stored.values())) as report:
            promises = None if quantise is None else Promises()
            reading = _Reading(stored, _dtype_of_all(model_class, wanted), report, promises)
            model = _build(path, model_class, config, reading, options).requires_grad_(False)
            if quantise is not None and promises is not None:
                promises.check(model)
                quantise(model, promises)
        on_device: PreTrainedModel = model.to(device)
        return on_device


def resolve_dtype(path: str, requested: str) -> torch.dtype:
    """Return the dtype that a model's parameters get.

    ``"auto"`` is bfloat16 where most of the file's own weights are, and float32 otherwise: for float32; for float16,
    whose precision bfloat16 has not; and for quantised GGUF, whose values bfloat16 would round a second time.

    Args:
        path: as for `load_model`.
        requested: ``"auto"``, ``"float32"`` or ``"bfloat16"``.

    Raises:
        ModelLoadError: another dtype is requested, or the file cannot be read.
    """
    if requested == "auto":
        with _explained(path):
            return _auto_dtype(open_checkpoint(path))
    if requested not in DTYPES:
        raise ModelLoadError(f"There is no dtype {requested!r} here: use auto, {' or '.join(DTYPES)}.")
    return DTYPES[requested]


def model_config(path: str) -> "PreTrainedConfig":
    """Return the transformers configuration of a GGUF file or of a Hugging Face folder.

    Raises:
        ModelLoadError: it cannot be read, or is of a kind that is not served.
    """
    with _explained(path):
        return open_checkpoint(path).config()


def quantisation_of(path: str, quantisation: "Quantisation") -> "Quantisation":
    """How a model's weights are quantised: a folder has no blocks that could be taken as they are, and becomes int8."""
    return "int8" if quantisation == "file" and Path(path).is_dir() else quantisation


def open_checkpoint(path: str) -> Checkpoint:
    """Open a GGUF file or a Hugging Face folder; see `Checkpoint`."""
    if Path(path).is_dir():
        from helix_gateway.runtime.checkpoints.folder import FolderCheckpoint

        return FolderCheckpoint(Path(path))
    from helix_gateway.runtime.checkpoints.gguf_model import GGUFCheckpoint

    return GGUFCheckpoint(Path(path))


def stored_sizes(path: str) -> Mapping[str, StoredSize]:
    """Return what a file or folder holds of weights, by the names that it has for them.

    Raises:
        ModelLoadError: it cannot be read.
    """
    with _explained(path):
        return open_checkpoint(path).sizes()


def unused_names(path: str, names: Iterable[str]) -> set[str]:
    """Which of a folder's tensors transformers passes over, such as layers that only draft.

    Raises:
        ModelLoadError: as `model_config`.
    """
    with _explained(path):
        patterns = getattr(_model_class(path, model_config(path)), "_keys_to_ignore_on_load_unexpected", None) or ()
        return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _auto_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return torch.bfloat16 if checkpoint.bfloat16_share() > 0.5 else torch.float32


def _dtype_of_all(model_class: Any, wanted: torch.dtype) -> torch.dtype | None:
    """The dtype that every weight gets; None where the model keeps some in float32, which transformers sees to."""
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return None if any(getattr(model_class, name, None) for name in kept) else wanted


def _model_class(path: str, config: "PreTrainedConfig") -> Any:
    """The class of the library's, untyped, since what its methods declare differs from release to release."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelLoadError(
            f"{path} is a model of type {config.model_type!r}, for which transformers has no causal language model."
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _parameter_names(model_class: Any, config: "PreTrainedConfig") -> list[str]:
    with torch.device("meta"):
        return list(model_class(config).state_dict())


class _Reading:
    """The reading of one checkpoint: how far it is, and the first error, which transformers might only log."""

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        dtype: torch.dtype | None,
        report: Report,
        promises: Promises | None,
    ) -> None:
        self._dtype = dtype
        self._promises = promises
        self.tensors = {name: _Watched(_Counted(tensor, self._count), self) for name, tensor in stored.items()}
        self.error: Exception | None = None
        self._report = report
        self._lock = threading.Lock()
        self._done_bytes = 0

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        try:
            if self._promises is not None and len(tensor.shape) == 2:
                return self._promises.promise(tensor)
            return tensor.read(self._dtype)
        except Exception as error:
            self.error = self.error or error
            raise

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._done_bytes += num_bytes
            self._report(self._done_bytes)


class _Counted:
    """A stored tensor that tells of its bytes when it is first read, in whatever form: a `StoredTensor`."""

    def __init__(self, tensor: StoredTensor, count: Callable[[int], None]) -> None:
        self._tensor = tensor
        self._count = count
        self._uncounted_bytes = tensor.nbytes
        self.nbytes, self.shape = tensor.nbytes, tensor.shape

    def blocks(self) -> Blocks | None:
        blocks = self._tensor.blocks()
        if blocks is not None:
            self._tell()
        return blocks

    def read(self, dtype: torch.dtype | None) -> torch.Tensor:
        values = self._tensor.read(dtype)
        self._tell()
        return values

    def _tell(self) -> None:
        if self._uncounted_bytes:
            self._count(self._uncounted_bytes)
            self._uncounted_bytes = 0


class _Watched:
    """A stored tensor as transformers is given it, which reads it by indexing."""

    def __init__(self, tensor: StoredTensor, reading: _Reading) -> None:
        self._tensor = tensor
        self._reading = reading

    def __getitem__(self, index: "EllipsisType") -> torch.Tensor:
        return self._reading.read(self._tensor)


def _build(
    path: str, model_class: Any, config: "PreTrainedConfig", reading: _Reading, options: Mapping[str, Any]
) -> Any:
    with _quiet_transformers():
        try:
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=reading.tensors,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        finally:
            if reading.error is not None:
                raise reading.error
    _check_complete(path, info)
    return model


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn whatever a damaged or unusual model makes transformers, torch or numpy raise into one line."""
    try:
        with memory_errors_named():
            yield
    except (ModelLoadError, OutOfMemoryError):
        raise
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ModelLoadError(f"Cannot load {path}: {type(error).__name__}: {first_line}") from error


def _check_complete(path: str, info: Mapping[str, Any]) -> None:
    for key, complaint in _COMPLAINTS:
        entries = info.get(key) or ()
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in entries)
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ModelLoadError(f"{path} {complaint} {', '.join(names[:_SHOWN])}{more}.")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing what we show, or raise, ourselves."""
    from transformers.utils import logging

    untyped: Any = logging
    verbosity, had_bars = untyped.get_verbosity(), untyped.is_progress_bar_enabled()
    untyped.set_verbosity(untyped.CRITICAL)
    untyped.disable_progress_bar()
    try:
        yield
    finally:
        untyped.set_verbosity(verbosity)
        if had_bars:
            untyped.enable_progress_bar()
