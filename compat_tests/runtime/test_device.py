"""The device that a user names is the one that computes, or one line says why not."""

from types import SimpleNamespace

import pytest
import torch

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime import device as device_module
from helix_gateway.runtime.device import free_memory_bytes, get_device


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
    (tmp_path / "memory.max").write_text("100\n")
    assert free_memory_bytes(torch.device("cpu")) == 0
