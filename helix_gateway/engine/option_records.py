"""What a request says of how its rows are sampled, as one record: made once, since it never changes.

Steps lay the records of their sequences behind one another, and read columns out of them.  Knows nothing about rows.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from helix_gateway.core.request import SamplingParams

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
