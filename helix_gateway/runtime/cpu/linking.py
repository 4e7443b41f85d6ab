"""Compiled functions that others call by a name, as they call the C library's, and that are therefore compiled once.

numba compiles whatever a function calls into that function once more, with all that it calls in turn.  A function that
is linked is compiled by itself, for types that are settled beforehand; whoever calls it holds a name alone, which is
resolved when compiled code is loaded.  So it must be linked before a caller is compiled, or loaded from the cache.
Knows nothing about what the functions do.
"""

import hashlib
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError

_linked: set[str] = set()


def linked_name(function: str, argument_types: tuple[types.Type, ...]) -> str:
    """What stands for a function and the types that it is linked for; other types never answer to it."""
    digest = hashlib.sha256(str(argument_types).encode()).hexdigest()[:16]
    return f"helix_{function}_{digest}"


def link(function: Any, name: str, argument_types: tuple[types.Type, ...]) -> None:
    """Compile a function that returns nothing (or load it from the cache), and let compiled code call it by a name.

    Args:
        function: what ``njit`` has made.
        name: `linked_name`: the same in every process.
        argument_types: of numba.
    """
    if name in _linked:
        return
    function.compile(argument_types)
    compiled = function.overloads[argument_types]
    binding.add_symbol(name, compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))
    _linked.add(name)


def check_linked(name: str) -> None:
    """Raise numba's error where nothing has been linked by that name: code that calls it would end the process."""
    if name not in _linked:
        raise TypingError(f"{name} must be linked before code that calls it is compiled")


def emit_call(context: Any, builder: ir.IRBuilder, name: str, types_: Any, arguments: Any) -> Any:
    """The call of a linked function that returns nothing, with arguments of exactly the types that it was linked for."""
    convention = context.call_conv
    function = cgutils.get_or_insert_function(builder.module, convention.get_function_type(types.void, types_), name)
    status, _ = convention.call_function(builder, function, types.void, types_, arguments)
    with cgutils.if_unlikely(builder, status.is_error):
        convention.return_status_propagate(builder, status)
    return context.get_dummy_value()
