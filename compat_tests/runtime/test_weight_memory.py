"""The stretch of memory that weights are moved to: what was there, on whole cache lines, no more than there is room for."""

import mmap

import pytest
import torch

from helix_gateway.runtime.cpu.weight_memory import WeightMemory, room_for


def test_tensors_lie_one_behind_another_as_they_were():
    tensors = [torch.randint(0, 256, (rows, 100), dtype=torch.uint8) for rows in (1, 3, 64)]
    memory = WeightMemory(sum(map(room_for, tensors)))
    moved = [memory.move(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, moved, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() % 64 == 0
        assert copy.data_ptr() != tensor.data_ptr()
    for one, following, tensor in zip(moved, moved[1:], tensors):
        assert following.data_ptr() - one.data_ptr() == room_for(tensor)


def test_more_than_there_is_room_for_is_refused():
    memory = WeightMemory(128)
    memory.move(torch.zeros(100, dtype=torch.uint8))
    with pytest.raises(ValueError, match="64 bytes were asked for where 0 are left"):
        memory.move(torch.zeros(1, dtype=torch.uint8))


def test_where_the_system_gives_no_stretch_of_its_own_it_is_ordinary_memory(monkeypatch):
    def full(*_arguments, **_options):
        raise OSError("no memory")

    monkeypatch.setattr(mmap, "mmap", full)
    tensor = torch.arange(100, dtype=torch.uint8)
    assert torch.equal(WeightMemory(128).move(tensor), tensor)
