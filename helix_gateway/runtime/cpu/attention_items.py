"""Attention of one item on one thread, and the writing of keys and values, for however the arena stores them.

Compiled code that calls `write_rows` or `attend_item` gets the one that suits the arena's dtype: `attention_float_items.py`
for float32 and bfloat16, `attention_int8_items.py` for int8.  Knows nothing about either.
"""

from typing import Any

from numba import types
from numba.extending import overload

from helix_gateway.runtime.cpu.attention_float_items import attend_float_item, write_float_rows
from helix_gateway.runtime.cpu.attention_int8_items import attend_int8_item, write_int8_rows

_COMPILED_ONLY = "numba puts what suits the arena's dtype in this place; Python itself has nothing to run here"


def write_rows(*arguments: Any) -> None:
    """Keys and values of the rows first:last into their pages; from compiled code only.

    Arguments, in their order:
        kind: any array of the dtype of new keys and values: float32, or uint16 for the bits of bfloat16.
        stored: the arena: float32, uint16 for the bits of bfloat16, or int8.
        shape: as `attention_shape.py` numbers its fields.
        offsets: [runs], where the layer's units of page 0 begin, in elements.
        plan: the step's.
        first: row.
        last: row behind the last.
        key: (address, elements between rows, elements between heads).
        value: the same.
    """
    raise NotImplementedError(_COMPILED_ONLY)


@overload(write_rows)
def _write_rows(kind, stored, shape, offsets, plan, first, last, key, value):  # type: ignore[no-untyped-def]
    def floats(kind, stored, shape, offsets, plan, first, last, key, value):  # type: ignore[no-untyped-def]
        write_float_rows(kind, stored, shape, offsets, plan, first, last, key, value)

    def int8s(kind, stored, shape, offsets, plan, first, last, key, value):  # type: ignore[no-untyped-def]
        write_int8_rows(kind, stored, shape, offsets, plan, first, last, key, value)

    return int8s if stored.dtype == types.int8 else floats


def attend_item(*arguments: Any) -> None:
    """One tile and some of its KV heads; from compiled code only.

    Arguments, in their order:
        kind: any array of the dtype of queries and outputs, as for `write_rows`.
        stored: as for `write_rows`, as are ``shape``, ``offsets`` and ``plan``.
        item: its number.
        query: (address, elements between rows, elements between heads).
        scaling: factor of every score.
        softcap: infinite where there is none.
        out: address of [num_tokens, query heads, value_dim].
        work: float32, the thread's scratch.
    """
    raise NotImplementedError(_COMPILED_ONLY)


@overload(attend_item)
def _attend_item(kind, stored, shape, offsets, plan, item, query, scaling, softcap, out, work):  # type: ignore[no-untyped-def]
    def floats(kind, stored, shape, offsets, plan, item, query, scaling, softcap, out, work):  # type: ignore[no-untyped-def]
        attend_float_item(kind, stored, shape, offsets, plan, item, query, scaling, softcap, out, work)

    def int8s(kind, stored, shape, offsets, plan, item, query, scaling, softcap, out, work):  # type: ignore[no-untyped-def]
        attend_int8_item(kind, stored, shape, offsets, plan, item, query, scaling, softcap, out, work)

    return int8s if stored.dtype == types.int8 else floats
