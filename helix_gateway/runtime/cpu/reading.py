"""Packed matrices from what a checkpoint stores: quantised, where a GGUF's blocks can be taken as they are, or in float.

Knows nothing about models, nor about which matrix is whose.
"""

from typing import Literal

import structlog
import torch

from helix_gateway.runtime.checkpoints.protocol import BlockKind, Blocks, StoredTensor
from helix_gateway.runtime.cpu.quantised_kernels import GROUP_INPUTS, JOINED_GROUPS
from helix_gateway.runtime.cpu.quantised_weights import Int4Weight, Int8ChannelWeight, Int8Weight, QuantisedWeight

log = structlog.get_logger(__name__)

Quantisation = Literal["file", "int8", "int4"]
"""``file``: a GGUF's own blocks where there are kernels that hold their numbers, else eight bits in such groups; ``int8``: a
scale a channel, where its inputs are whole pairs of groups."""

MatrixQuantisation = Quantisation | Literal["grouped_int8"]
"""What one matrix of a model gets; ``grouped_int8``: eight bits in groups, whatever the others have."""


def of_tables(quantisation: Quantisation) -> MatrixQuantisation:
    """What tables of tokens and output embeddings get beside such layers.

    What decides between tokens is rounded to eight bits, in groups; a file's own blocks stay what they are.
    """
    return "file" if quantisation == "file" else "grouped_int8"


def read_quantised(stored: StoredTensor, quantisation: MatrixQuantisation) -> QuantisedWeight:
    """A stored matrix [channels, inputs], quantised.

    Raises:
        ModelLoadError: it cannot be read.
    """
    blocks = stored.blocks() if quantisation == "file" else None
    packed = None if blocks is None else _from_blocks(blocks)
    return quantised(stored.read(None), quantisation) if packed is None else packed


def quantised(matrix: torch.Tensor, quantisation: MatrixQuantisation) -> QuantisedWeight:
    """A matrix [channels, inputs], quantised."""
    return kind_for(matrix.shape[1], quantisation).from_float(matrix)


def kind_for(inputs: int, quantisation: MatrixQuantisation) -> type[QuantisedWeight]:
    """What `quantised` makes of a matrix of so many inputs."""
    if quantisation == "int4":
        return Int4Weight
    if quantisation == "int8" and not inputs % (JOINED_GROUPS * GROUP_INPUTS):
        return Int8ChannelWeight
    # Beside blocks of a file, with which it may be computed as one matrix, too.
    return Int8Weight


def kind_of_blocks(kind: BlockKind) -> type[Int8Weight] | type[Int4Weight]:
    """What holds the very numbers of a file's blocks."""
    return Int8Weight if kind == "Q8_0" else Int4Weight


def _from_blocks(blocks: Blocks) -> QuantisedWeight | None:
    """The very numbers of a matrix's blocks; None, and a line in the log, where no packed form holds them."""
    try:
        return kind_of_blocks(blocks.kind).from_blocks(blocks.numbers)
    except ValueError as error:
        channels, groups, _ = blocks.numbers.shape
        log.warning("blocks_quantised_to_int8", stored=blocks.kind, channels=channels, groups=groups, reason=str(error))
        return None
