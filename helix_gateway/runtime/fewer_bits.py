"""A float model's own weights at fewer bits, over the pages and tables of the float model's.

Read from the same file beside a model that is served: a GGUF's blocks as they are, so that what is rounded is activations
alone; else in int8.  What it answers is near to what the model does, no more; whoever asks must be able to bear that.
Nothing here computes with several threads or writes to a page, so it may be done while another thread serves.  Knows
nothing about what the answers are for.
"""

from dataclasses import replace

import msgspec

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.cpu.compiled_steps import step_of
from helix_gateway.runtime.cpu.parts import Parts
from helix_gateway.runtime.cpu.quantised_llama import is_quantised_alike
from helix_gateway.runtime.cpu.reading import Quantisation
from helix_gateway.runtime.description import Description, Form, described_tensors, read_parts, recall
from helix_gateway.runtime.loading import open_checkpoint, quantisation_of
from helix_gateway.runtime.paged_attention import PagedAttention
from helix_gateway.runtime.paged_runner import Compute, PagedRunner


def at_fewer_bits(path: str, runner: PagedRunner) -> PagedRunner:
    """A runner of the same model at fewer bits over the same pages; only one of both may compute at a time.

    Args:
        path: what the runner's model was loaded from.

    Raises:
        ModelLoadError: there is no compiled step of it, it is quantised already, or its file cannot be read so.
    """
    description, parts = recall(runner.remembered), runner.parts
    if runner.is_quantised:
        raise ModelLoadError("its weights are quantised already")
    if parts is None or description is None:
        raise ModelLoadError("there is no compiled step of it")
    read = _read(path, description, quantisation_of(path, "file"))
    # A file may store in several ways what is computed as one matrix.
    if not is_quantised_alike(read):
        del read  # there is not room for both
        read = _read(path, description, "int8")
    quantised = replace(read, rotary=parts.rotary)

    def step(attention: PagedAttention) -> Compute:
        found = step_of(quantised, attention)
        if found is None:
            raise ModelLoadError("there is no compiled step of it in int8")
        return found

    return runner.beside(step, quantised)


def _read(path: str, description: Description, quantisation: Quantisation) -> Parts:
    # What is rounded to int8 is float32 before and after.
    told = msgspec.structs.replace(description, form=Form("float32", quantisation))
    return read_parts(told, described_tensors(told, open_checkpoint(path)), _tell_nobody)


def _tell_nobody(_: int) -> None:
    """Nobody waits for it."""
