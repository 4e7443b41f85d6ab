"""A float model in four bits, rounded for the inputs that its layers get while it reads some text.

Half of the text is the model's own (`own_text.py`), half is given: what a model writes is as broad as what it has
learned, but not as well put as what it is to read.  That takes minutes of processor time, so it is done once: the blocks
are kept, and later starts read them as a GGUF's.  What cannot be rounded so (no compiled step to write a text with,
matrices that no input reaches, too little memory, too many multiplications) is rounded without regard to inputs, and
said so.  Knows nothing about serving.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
import torch

from helix_gateway.runtime.cpu.calibrating import NotCalibratedError, Rounded, round_as_inputs_come, unrounded
from helix_gateway.runtime.device import free_memory_bytes
from helix_gateway.runtime.heap import return_freed_blocks, returning_freed_memory
from helix_gateway.runtime.kept_blocks import NamedBlocks, keep_blocks, recall_blocks
from helix_gateway.runtime.loading import load_model, open_checkpoint
from helix_gateway.runtime.own_text import Int64s, own_text
from helix_gateway.runtime.paged_runner import PagedRunner
from helix_gateway.runtime.progress import Report, terminal_bar
from helix_gateway.runtime.promises import Promises
from helix_gateway.runtime.remembered import Remembered, file_identities, remembered_folder, surroundings
from helix_gateway.runtime.weight_room import NoRoomError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = structlog.get_logger(__name__)

_VERSION = 1
"""Of what is done here and in all that it calls: whoever changes what comes out of it raises it."""
_SEQUENCES, _LENGTH = 16, 512
"""Of the text."""
TEXT_TOKENS = 2 * _SEQUENCES * _LENGTH
"""Of keys and values that a runner needs room for to write it; pages are of whole tokens."""
_REFUSED, _BEGUN = "not_calibrated", "calibrating"
_MOST_BEGUN = 2
"""Starts that were killed in the middle, by lack of memory or by somebody's impatience, before none tries again."""
_SMOLLM2_SQUARES = 131e6
"""Of widths of inputs, all matrices of SmolLM2-135M together: what time is in proportion to."""
_MOST_SQUARES = 20 * _SMOLLM2_SQUARES
"""More is not waited for."""
_ROOM = 24
"""Bytes for each of a text's tokens and each of the widest layer's inputs: some float32 rows at once."""

_MOMENTS = 40
"""Bytes for each square of the widest layer's inputs: their second moments in float32 and float64, factors and inverse."""

LoadInt8 = Callable[[str], PagedRunner]
"""A model in int8, with room for `TEXT_TOKENS`."""
SampleIds = Callable[[str], Sequence[int]]
"""Tokens of some text, as the tokenizer of the model at a path has them."""


def four_bits_of(path: str, load_int8: LoadInt8, sample_ids: SampleIds | None) -> NamedBlocks | None:
    """The blocks of a model in Hugging Face layout; None, and a line in the log, where it cannot be rounded so.

    Args:
        path: the folder.
        load_int8: what writes its own text is loaded with; called, as is the other, only if nothing is kept.
        sample_ids: of the text that is given; None: all is its own.
    """
    told = {"files": file_identities(path), "rounding": _VERSION, "is_text_given": sample_ids is not None}
    remembered = Remembered(told, remembered_folder())
    kept = recall_blocks(remembered)
    if kept is not None:
        return kept
    # What cannot be done here and now, another state of the code, or another machine, may do.
    attempts = Remembered({**told, **surroundings()}, remembered_folder())
    try:
        with _attempt(attempts):
            return keep_blocks(_rounded(path, load_int8, sample_ids), remembered)
    except NotCalibratedError as error:
        reason = str(error)
        attempts.put(_REFUSED, reason)
    except NoRoomError:  # whose message advises what is in use
        reason = "too little memory is free to load it in eight bits, in which it is asked for its inputs"
    except Exception as error:  # noqa: BLE001 - whatever it is, the model can be served without
        reason = f"{type(error).__name__}: {error}"
    log.warning("rounded_without_calibration", model=path, reason=reason)
    return None


@contextmanager
def _attempt(attempts: Remembered) -> Iterator[None]:
    """Count what begins, as long as it has not ended: a process that is killed in the middle says nothing.

    Raises:
        NotCalibratedError: it was refused before, or did not come to an end too often.
    """
    refused, begun = attempts.get(_REFUSED), attempts.get(_BEGUN) or 0
    if refused is not None:
        raise NotCalibratedError(refused)
    if begun >= _MOST_BEGUN:
        raise NotCalibratedError(f"{begun} starts were killed while they did it; {remembered_folder()} remembers them")
    attempts.put(_BEGUN, begun + 1)
    try:
        yield
    finally:
        attempts.forget(_BEGUN)


def _rounded(path: str, load_int8: LoadInt8, sample_ids: SampleIds | None) -> Rounded:
    _check_size(path)
    given = np.array([] if sample_ids is None else sample_ids(path), np.int64)
    ids = _text(load_int8(path), given)
    gc.collect()
    return_freed_blocks()
    return _round(path, ids)


def _check_size(path: str) -> None:
    """Make sure that it takes neither too long nor too much memory.

    Keys and values of the text it writes are gone by then, and take no more than half of what is free before.

    Raises:
        NotCalibratedError: it would take too long, whatever the machine.
        MemoryError: there is too little memory at present.
    """
    shapes = [tensor.shape for tensor in open_checkpoint(path).tensors(tuple).values() if len(tensor.shape) == 2]
    squares = sum(shape[1] ** 2 for shape in shapes)
    if squares > _MOST_SQUARES:
        raise NotCalibratedError(f"it is {squares / _SMOLLM2_SQUARES:.0f} times the work of SmolLM2-135M")
    in_int8 = sum(math.prod(shape) for shape in shapes) * 5 // 4
    width = max(shape[1] for shape in shapes)
    needed = in_int8 + _ROOM * _SEQUENCES * _LENGTH * width + _MOMENTS * width**2
    free = free_memory_bytes(torch.device("cpu"))
    if needed > free:
        raise MemoryError(f"it takes {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} are free")


def _text(runner: PagedRunner, given: Int64s) -> Int64s:
    """Tokens [sequences, length]; those that are given from places all over the text."""
    if runner.parts is None:
        raise NotCalibratedError("there is no compiled step of it")
    length = min(_LENGTH, runner.context_length)
    windows = _SEQUENCES // 2 if len(given) >= length else 0
    starts = np.linspace(0, len(given) - length, windows).astype(int)
    read = [given[None, start : start + length] for start in starts]
    return np.concatenate([*read, own_text(runner, _SEQUENCES - windows, length)])


def _round(path: str, ids: Int64s) -> Rounded:
    rounded: Rounded = {}

    def round_all(model: "PreTrainedModel", promises: Promises) -> None:
        nonlocal rounded
        rounded = round_as_inputs_come(model, promises)
        base: Any = model.base_model
        with torch.inference_mode():
            base(input_ids=torch.from_numpy(ids), use_cache=False)
        if unrounded(model):
            raise NotCalibratedError(f"no input reaches {unrounded(model)} of its layers")

    with returning_freed_memory():
        load_model(path, device=torch.device("cpu"), dtype=torch.float32, quantise=round_all, progress=_shown)
    missing = rounded.keys() - open_checkpoint(path).tensors(tuple).keys()
    if missing:
        raise NotCalibratedError(f"its files have other names for {len(missing)} of its matrices")
    return rounded


def _shown(label: str, total_bytes: int) -> AbstractContextManager[Report]:
    return terminal_bar(label.replace("Loading", "Rounding to four bits", 1), total_bytes)
