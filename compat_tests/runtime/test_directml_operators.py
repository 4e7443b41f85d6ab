"""A whole step of a model on the torch path calls no operator that DirectML lacks.

An operator is there if DirectML registers it, or the ``out`` variant that it is made from.  Those that torch composes of
others are taken apart and their parts looked at; views need ``as_strided`` alone; a few make memory or copy, and are
listed with what they call.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compat_tests.runtime.paged import Feeder, random_sequences
from compat_tests.tiny_models import TINY_MODELS
from helix_gateway.core.step import LogitEdits, SamplingRows
from helix_gateway.runtime.pool import make_runners
from helix_gateway.runtime.sampling.torch_sampler import TorchSampler
from helix_gateway.runtime.torch_attention import TorchPagedAttention

CPU = torch.device("cpu")
REGISTERED = set((Path(__file__).parents[1] / "data" / "directml_ops.txt").read_text().split())
# torch's own CompositeExplicitAutograd kernels: what they call on the device.
COMPOSED = {
    "aten::_to_copy": {"aten::empty_strided", "aten::copy_"},
    "aten::clone": {"aten::empty_strided", "aten::copy_"},
    "aten::index_put_": {"aten::_index_put_impl_"},
    "aten::new_empty": {"aten::empty.memory_format"},
    "aten::empty_like": {"aten::empty_strided"},
    "aten::zeros": {"aten::empty.memory_format", "aten::zero_"},
    "aten::ones": {"aten::empty.memory_format", "aten::fill_.Scalar"},
    "aten::scalar_tensor": {"aten::empty.memory_format", "aten::fill_.Scalar"},
    "aten::arange": {"aten::arange.start_out"},
    "aten::arange.start": {"aten::arange.start_out"},
    "aten::bitwise_and.Scalar": {"aten::bitwise_and.Tensor_out"},
    "aten::detach": set(),
    "aten::lift_fresh": set(),
}
# Kernels of a functional operator go by another overload's name where they write to ``out``.
OUT_NAMES = {
    "aten::index.Tensor": "aten::index.Tensor_out",
    "aten::mean.dim": "aten::mean.out",
    "aten::sum.dim_IntList": "aten::sum.IntList_out",
    "aten::argmax": "aten::argmax.out",
    "aten::scatter.src": "aten::scatter.src_out",
    "aten::topk": "aten::topk.values",
    "aten::max.dim": "aten::max.dim_max",
    "aten::sort": "aten::sort.values_stable",
    "aten::sort.stable": "aten::sort.values_stable",
}


def is_there(operator):
    """Whether DirectML runs an operator as it is."""
    name = operator.name()
    base = name.split(".")[0]
    if name in REGISTERED or name in COMPOSED or operator.is_view:
        return COMPOSED.get(name, set()) <= REGISTERED
    functional = base.removesuffix("_")
    overload = f".{operator._overloadname}_out" if operator._overloadname != "default" else ".out"
    candidates = {OUT_NAMES.get(name), functional + overload, functional + ".out"}
    return bool(candidates & REGISTERED)


class Needs(TorchDispatchMode):
    """Collects the operators that a device must have."""

    def __init__(self):
        super().__init__()
        self.seen, self.missing = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not is_there(func):
            key = torch._C.DispatchKey.CompositeImplicitAutograd
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
                with self:
                    return func.decompose(*args, **kwargs)
            self.missing.add(func.name())
        self.seen.add(func.name())
        return func(*args, **kwargs)


def make_feeder(name, lengths):
    _, model = TINY_MODELS[name](0)
    (runner,) = make_runners(
        [model], device=CPU, dtype=torch.float32, block_size=4, num_pages=64, attention=TorchPagedAttention
    )
    runner._sampler = TorchSampler(CPU, runner.vocab_size)
    return Feeder(runner, random_sequences(lengths))


def sampling_rows(count):
    floats, ints = np.ones(count, np.float32), np.zeros(count, np.int32)
    none = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32)
    rows = np.arange(count, dtype=np.int32)
    return SamplingRows(
        rows,
        np.arange(count, dtype=np.uint64),
        ints,
        rows,
        floats,
        ints + 20,
        floats * 0.9,
        floats * 0.01,
        LogitEdits(*none),
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_a_step_needs_nothing_that_directml_lacks(name):
    feeder = make_feeder(name, (30, 9, 4))
    with Needs() as needs:
        feeder.step([(0, 0, 20), (1, 0, 5)])  # chunks
        feeder.step([(0, 20, 21), (1, 5, 9), (2, 0, 1)])  # a decode, a window, a newcomer
        logits = feeder.runner.forward(feeder.batch([(2, 1, 4)]))
        feeder.runner.copy_pages([(1, 2)])
        feeder.runner.sample(logits, sampling_rows(3))
        feeder.runner.logprobs(logits, np.arange(3, dtype=np.int32), np.ones(3, np.int32), 5)
    assert {"aten::index_put_", "aten::bmm", "aten::_softmax"} <= needs.seen
    assert not needs.missing


def test_an_operator_that_directml_lacks_would_be_seen():
    feeder = make_feeder("llama", (5,))
    plain = feeder.runner._model.model.norm.forward
    feeder.runner._model.model.norm.forward = lambda x: plain(torch.special.bessel_j0(x).cumprod(1))
    with Needs() as needs:
        feeder.step([(0, 0, 5)])
    assert needs.missing == {"aten::special_bessel_j0", "aten::cumprod"}
