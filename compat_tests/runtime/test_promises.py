"""Matrices that are not read with their model: what stands for them, who notices, and what is read in the end."""

import pytest
import torch
from torch import nn

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.promises import Promises


class Stored:
    """A matrix in a file that counts how often it is read."""

    def __init__(self, rows, columns):
        self.shape, self.nbytes, self.reads = (rows, columns), rows * columns * 4, 0

    def blocks(self):
        return None

    def read(self, dtype):
        self.reads += 1
        return torch.arange(self.shape[0] * self.shape[1], dtype=dtype).view(self.shape)


def model_of(parameter):
    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(parameter, requires_grad=False)
    return model


def test_a_promise_has_a_shape_and_no_memory_until_it_is_fulfilled():
    promises, stored = Promises(), Stored(1 << 20, 1 << 20)
    parameter = promises.promise(stored)
    assert parameter.shape == stored.shape
    assert parameter.untyped_storage().nbytes() == 4
    assert promises.stored(parameter) is stored
    assert promises.stored(torch.zeros(3)) is None
    assert stored.reads == 0


def test_what_nobody_took_is_read_into_the_model():
    promises, stored = Promises(), Stored(3, 2)
    model = model_of(promises.promise(stored))
    promises.check(model)
    promises.fulfil(model)
    assert torch.equal(model.weight, torch.arange(6.0).view(3, 2))
    assert stored.reads == 1


def test_whoever_computed_with_a_promise_is_found_out():
    promises = Promises()
    model = model_of(promises.promise(Stored(3, 2)) * 2)
    with pytest.raises(ModelLoadError, match="--quantization none"):
        promises.check(model)
