"""The device that a user names is the one that computes, or one line says why not."""

import errno
import sys
from types import SimpleNamespace

import pytest
import torch

from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError
from helix_gateway.runtime import device as device_module
from helix_gateway.runtime.device import (
    free_memory_bytes,
    get_device,
    memory_errors_named,
    obtainable_memory_bytes,
)


@pytest.fixture
def there(monkeypatch):
    """Pretend that some devices are there."""

    def pretend(*names):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in names)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in names)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: "xpu" in names)
        directml = SimpleNamespace(is_available=lambda: True, device=lambda: torch.device("privateuseone:0"))
        monkeypatch.setattr(device_module, "_directml", lambda: directml if "directml" in names else None)

    return pretend


@pytest.mark.parametrize(
    "present, chosen",
    [
        ((), "cpu"),
        (("xpu",), "xpu"),
        (("mps", "xpu"), "mps"),
        (("directml", "mps"), "privateuseone"),
        (("cuda", "directml", "mps"), "cuda"),
    ],
)
def test_the_fastest_device_there_is_computes(there, present, chosen):
    there(*present)
    assert get_device().type == chosen


@pytest.mark.parametrize("name", ["cuda", "directml", "mps", "xpu"])
def test_a_device_that_is_not_there_is_refused_by_name(there, name):
    there()
    with pytest.raises(ModelLoadError, match=f"no {name} device"):
        get_device(name)


def test_a_cpu_may_be_asked_for_where_there_is_something_faster(there):
    there("cuda")
    assert get_device("cpu").type == "cpu"


def test_free_memory_is_bounded_by_the_container(monkeypatch, tmp_path):
    whole = free_memory_bytes(torch.device("cpu"))
    assert whole > 1 << 20
    monkeypatch.setattr(device_module, "_CGROUP", tmp_path)
    assert free_memory_bytes(torch.device("cpu")) > 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 200000\n")
    assert free_memory_bytes(torch.device("cpu")) > 1 << 20
    (tmp_path / "memory.max").write_text("900000\n")
    assert free_memory_bytes(torch.device("cpu")) == 400000
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 150000\nactive_file 50000\n")
    assert free_memory_bytes(torch.device("cpu")) == 400000
    (tmp_path / "memory.max").write_text("100\n")
    assert free_memory_bytes(torch.device("cpu")) == 0


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Linux with so much memory, in a container of `tmp_path`'s files."""

    def machine(*, total, available, swap):
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(device_module, "_CGROUP", tmp_path)
        monkeypatch.setattr(device_module, "_ZFS_CACHE", tmp_path / "arcstats")
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=total, available=available))
        monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=swap))

    return machine


def test_what_can_be_had_at_most_is_what_others_need_not_keep_too(machine, monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    machine(total=10000, available=4000, swap=1000)
    assert obtainable_memory_bytes(cpu) == 5000
    (tmp_path / "arcstats").write_text("13 1 0x01 147 39984\nname type data\nhits 4 88\nsize 4 3000\n")
    assert obtainable_memory_bytes(cpu) == 8000
    machine(total=10000, available=4000, swap=9000)
    assert obtainable_memory_bytes(cpu) == 10000
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("inactive_file 100\nactive_file 200\n")
    (tmp_path / "memory.swap.max").write_text("0\n")
    assert obtainable_memory_bytes(cpu) == 800
    (tmp_path / "memory.swap.max").write_text("500\n")
    (tmp_path / "memory.swap.current").write_text("100\n")
    assert obtainable_memory_bytes(cpu) == 1200
    monkeypatch.setattr(sys, "platform", "darwin")
    assert obtainable_memory_bytes(cpu) == 10000


@pytest.mark.parametrize("is_integrated, bytes_", [(False, 700 + 300 - 200), (True, 1000 + 10000)])
def test_of_a_gpu_it_is_what_is_free_and_what_this_process_keeps_for_itself(
    is_integrated, bytes_, machine, monkeypatch
):
    machine(total=10000, available=4000, swap=0)
    properties = SimpleNamespace(total_memory=1000, is_integrated=is_integrated)
    told = {"get_device_properties": properties, "mem_get_info": (700, 1000), "memory_reserved": 300}
    for name, value in {**told, "memory_allocated": 200}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert obtainable_memory_bytes(torch.device("cuda")) == bytes_


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_all_ways_to_say_that_memory_is_full_are_one(error):
    with pytest.raises(OutOfMemoryError), memory_errors_named():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), FileNotFoundError(errno.ENOENT, "none")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)), memory_errors_named():
        raise error
