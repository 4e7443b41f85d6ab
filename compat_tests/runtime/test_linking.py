"""Compiled functions that others call by name."""

import numpy as np
import pytest
from numba import njit, types
from numba.core.errors import TypingError
from numba.core.typing import signature
from numba.extending import intrinsic

from helix_gateway.runtime.cpu.linking import check_linked, emit_call, link, linked_name

_TYPES = (types.Array(types.int64, 1, "C"), types.int64)
_NAME = linked_name("test_count_up", _TYPES)


@njit
def _count_up(numbers, most):
    if most < 0:
        raise ValueError("negative")
    for i in range(most):
        numbers[i] += i


@intrinsic
def _call(typing_context, numbers, most):
    check_linked(_NAME)

    def emit(context, builder, called, arguments):
        return emit_call(context, builder, _NAME, _TYPES, arguments)

    return signature(types.void, *_TYPES), emit


def _caller():
    @njit
    def call(numbers, most):
        _call(numbers, most)

    return call


def test_code_that_calls_what_is_not_linked_is_refused_and_runs_once_it_is():
    with pytest.raises(TypingError, match=f"{_NAME} must be linked"):
        _caller()(np.zeros(3, np.int64), 3)
    link(_count_up, _NAME, _TYPES)
    link(_count_up, _NAME, _TYPES)
    assert _count_up.signatures == [_TYPES]
    numbers = np.zeros(3, np.int64)
    for caller in (_caller(), _caller()):
        caller(numbers, np.int32(3))
    assert numbers.tolist() == [0, 2, 4]
    assert _count_up.signatures == [_TYPES]
    with pytest.raises(ValueError, match="negative"):
        _caller()(numbers, -1)


def test_a_name_stands_for_one_function_and_its_types():
    others = [
        (types.Array(types.int64, 1, "A"), types.int64),
        (types.Array(types.int64, 2, "C"), types.int64),
        (types.Array(types.int64, 1, "C"), types.int32),
        (types.Array(types.int64, 1, "C"), types.int64, types.int64),
    ]
    names = {_NAME, linked_name("test_count_down", _TYPES), *(linked_name("test_count_up", other) for other in others)}
    assert len(names) == 6
    assert linked_name("test_count_up", (types.Array(types.int64, 1, "C"), types.int64)) == _NAME
