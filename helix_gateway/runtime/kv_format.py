"""How much room the keys and values of a token take, in each dtype they may be stored in.

In a floating-point dtype an element is a number.  In int8 an element is a byte: of each head the keys, the values, and
one float32 scale for each of the two; a number is its byte times the scale (the largest of them is 127, symmetric
quantisation as in Jacob et al. 2018, section 2.1, with zero point 0).  Where in a unit what lies is the attention's
affair.  Knows nothing about pages.
"""

import torch

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.groups import LayerShape

SCALE_BYTES = 4
"""Of one float32 scale."""
QUAD = 4
"""Bytes that one lane of an integer dot product takes: int8 keys come in fours of dimensions, values in fours of tokens."""
TOP = 127
"""The largest quantised number; the least is its negative."""

_NAMES = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float32": torch.float32}


def kv_dtype(name: str) -> torch.dtype | None:
    """The dtype of keys and values that is asked for, None for ``"auto"``.

    Raises:
        ModelLoadError: there is none of that name.
    """
    if name == "auto":
        return None
    if name not in _NAMES:
        raise ModelLoadError(f"There is no KV cache dtype {name!r} here: use auto, {', '.join(_NAMES)}.")
    return _NAMES[name]


def padded(dim: int) -> int:
    """A head dimension as int8 stores it."""
    return -(-dim // QUAD) * QUAD


def token_elements(shape: LayerShape, dtype: torch.dtype) -> int:
    """Elements stored of one token in one layer."""
    if dtype == torch.int8:
        return shape.kv_heads * (padded(shape.key_dim) + padded(shape.value_dim) + 2 * SCALE_BYTES)
    return shape.kv_heads * (shape.key_dim + shape.value_dim)


def tokens_apart(dtype: torch.dtype) -> int:
    """What the tokens of a unit are a multiple of."""
    return QUAD if dtype == torch.int8 else 1
