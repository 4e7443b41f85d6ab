"""What a request says of how its rows are sampled, as one record: made once, since it never changes.

Steps lay the records of their sequences behind one another, and read columns out of them: the same ones as the step before
where it had the same sequences with as many rows.  Knows nothing about what rows are.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from helix_gateway.core.request import SamplingParams
from helix_gateway.core.step import Float32s, Int32s, UInt64s

_RECORD = np.dtype(
    [
        ("seed", np.uint64),
        ("choice", np.int32),
        ("top_k", np.int32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
    ],
    align=True,
)
_SEED = 0xFFFF_FFFF_FFFF_FFFF
_EVERY_TOKEN = np.iinfo(np.int32).max
"""As top-k: no vocabulary is larger."""
_REMEMBERED = 8
"""Batches whose columns are remembered: a target's, its drafters', and those now and then with other windows."""

OptionRecords: TypeAlias = npt.NDArray[Any]
"""Records, one a sequence; fields are seed, choice, top_k (which may be more than there are tokens), temperature, top_p
and min_p, of the dtypes that `SamplingRows` has."""


def option_record(params: SamplingParams, choice: int) -> bytes:
    """The options of choice ``choice`` of a request."""
    top_k = min(params.top_k or _EVERY_TOKEN, _EVERY_TOKEN)
    numbers = (params.seed & _SEED, choice, top_k, params.temperature, params.top_p, params.min_p)
    return np.array(numbers, _RECORD).tobytes()


def join_records(records: Iterable[bytes]) -> OptionRecords:
    """The records one after the other, read-only."""
    return np.frombuffer(b"".join(records), _RECORD)


class OptionColumns(NamedTuple):
    """The options of some rows, as `SamplingRows` has them; shared by steps, so nobody writes to them."""

    seed: UInt64s
    choice: Int32s
    temperature: Float32s
    top_k: Int32s
    top_p: Float32s
    min_p: Float32s


@lru_cache(_REMEMBERED)
def option_columns(records: tuple[bytes, ...], counts: tuple[int, ...], vocab_size: int) -> OptionColumns:
    """The options of the rows of sequences that have these records, and so many rows each."""
    options = join_records(records).repeat(np.array(counts, np.int64))
    return OptionColumns(
        seed=options["seed"].copy(),  # columns lie apart in records; samplers want them whole
        choice=options["choice"].copy(),
        temperature=options["temperature"].copy(),
        top_k=np.minimum(options["top_k"], np.int32(vocab_size)),
        top_p=options["top_p"].copy(),
        min_p=options["min_p"].copy(),
    )
