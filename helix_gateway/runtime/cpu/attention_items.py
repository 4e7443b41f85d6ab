"""Attention of one item on one thread, and the writing of keys and values, for however the arena stores them.

Compiled code that calls `write_rows` or `attend_item` calls the one that suits the arena's dtype: `attention_float_items.py`
for float32 and bfloat16, `attention_int8_items.py` for int8.  It calls them by name (`linking.py`), so that they are
compiled once for all callers; `link_items` must have been called for the dtypes before.  Knows nothing about either.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from helix_gateway.runtime.cpu.attention_float_items import attend_float_item, write_float_rows
from helix_gateway.runtime.cpu.attention_int8_items import attend_int8_item, write_int8_rows
from helix_gateway.runtime.cpu.attention_shape import Plan
from helix_gateway.runtime.cpu.linking import check_linked, emit_call, link, linked_name


def _array(dtype: types.Type, dimensions: int = 1) -> Any:
    return types.Array(dtype, dimensions, "C")


_SOURCE = types.UniTuple(types.int64, 3)
_INT32S, _INT64S = _array(types.int32), _array(types.int64)
_PLAN = types.NamedTuple([_INT64S, _INT32S, _array(types.int32, 2), _INT32S, _INT32S, types.int64, _INT64S], Plan)
_WRITE = (types.int64, types.int64, _SOURCE, _SOURCE)
_ATTEND = (types.int64, _SOURCE, types.float64, types.float64, types.int64, _array(types.float32))


@intrinsic
def write_rows(typing_context, kind, stored, shape, offsets, plan, first, last, key, value):  # type: ignore[no-untyped-def]
    """Keys and values of the rows first:last into their pages.

    Args:
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
    return _call("write_rows", kind, (stored, shape, offsets, plan), _WRITE)


@intrinsic
def attend_item(  # type: ignore[no-untyped-def]
    typing_context, kind, stored, shape, offsets, plan, item, query, scaling, softcap, out, work
):
    """One tile and some of its KV heads.

    Args:
        kind: any array of the dtype of queries and outputs, as for `write_rows`.
        stored: as for `write_rows`, as are ``shape``, ``offsets`` and ``plan``.
        item: its number.
        query: (address, elements between rows, elements between heads).
        scaling: factor of every score.
        softcap: infinite where there is none.
        out: address of [num_tokens, query heads, value_dim].
        work: float32, the thread's scratch.
    """
    return _call("attend_item", kind, (stored, shape, offsets, plan), _ATTEND)


def link_items(kind: Any, stored: Any) -> None:
    """Have both compiled for an arena, and for activations of one dtype."""
    dtypes = from_dtype(kind.dtype), from_dtype(stored.dtype)
    is_int8 = dtypes[1] == types.int8
    write, attend = (write_int8_rows, attend_int8_item) if is_int8 else (write_float_rows, attend_float_item)
    for function, name, numbers in ((write, "write_rows", _WRITE), (attend, "attend_item", _ATTEND)):
        taken = (*_settled(*dtypes), *numbers)
        link(function, linked_name(name, taken), taken)


def _settled(kind: types.Type, stored: types.Type) -> tuple[Any, ...]:
    """The types that both begin with."""
    return (_array(kind), _array(stored), _INT64S, _INT64S, _PLAN)


def _call(function: str, kind: types.Type, pages: tuple[types.Type, ...], numbers: tuple[types.Type, ...]) -> Any:
    """What an intrinsic returns that calls a linked function; numbers are cast to what it takes, arrays are not."""
    dtypes = kind.dtype, pages[0].dtype
    taken = _settled(*dtypes)
    name = linked_name(function, (*taken, *numbers))
    check_linked(name)
    if pages != taken[1:]:
        return None

    def emit(context: Any, builder: ir.IRBuilder, called: Any, arguments: Any) -> Any:
        # The first array may have any shape: of it, the size of an element is all that is looked at.
        first = context.make_array(taken[0])(context, builder)
        first.itemsize = context.get_constant(types.intp, dtypes[0].bitwidth // 8)
        return emit_call(context, builder, name, (*taken, *numbers), [first._getvalue(), *arguments[1:]])

    return signature(types.void, kind, *pages, *numbers), emit
