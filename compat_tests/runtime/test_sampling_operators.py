"""The torch sampler runs on DirectML: it calls no operator that DirectML lacks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_reference import Row, sampling_rows
from torch.utils._python_dispatch import TorchDispatchMode

from helix_gateway.runtime.sampling.torch_sampler import TorchSampler

LISTED = {
    line.split("::")[1].split(".")[0]
    for line in (Path(__file__).parents[1] / "data" / "directml_ops.txt").read_text().split()
    if line.startswith("aten::")
}
# Views, which every device has through as_strided, and what torch itself makes of listed operators.
BUILT = {
    "view": set(),
    "detach": set(),
    "lift_fresh": set(),
    "unsqueeze": {"as_strided"},
    "squeeze": {"as_strided"},
    "slice": {"as_strided"},
    "expand": {"as_strided"},
    "_to_copy": {"empty_strided", "copy_"},
    "_unsafe_view": set(),
    "clone": {"empty_strided", "copy_"},
}


class Recorder(TorchDispatchMode):
    """Notes each operator's name and lets it run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def missing(operators):
    """Operators that DirectML neither has nor gets from torch out of those it has."""
    in_place = {name: name.rstrip("_") if not name.startswith("_") else name for name in operators}
    return {
        name for name in operators if not ({name, in_place[name]} & LISTED or (name in BUILT and BUILT[name] <= LISTED))
    }


@pytest.mark.parametrize(
    "rows",
    [
        [Row()],
        [Row(temperature=0.0)],
        [Row(top_k=3), Row(top_p=0.5), Row(min_p=0.1)],
        [Row(edits={3: (1.2, -1.0)}), Row(allowed={1, 2})],
    ],
    ids=["noise", "greedy", "filters", "edits and masks"],
)
def test_sampling_needs_only_listed_operators(rows):
    logits, sampler = torch.randn(1, 40), TorchSampler(torch.device("cpu"), 40)
    with Recorder() as recorder:
        sampler.sample(logits, sampling_rows(rows, 40))
    assert recorder.seen
    assert not missing(recorder.seen)


def test_logprobs_need_only_listed_operators():
    logits, sampler = torch.randn(2, 40), TorchSampler(torch.device("cpu"), 40)
    with Recorder() as recorder:
        sampler.logprobs(logits, np.array([0, 1], np.int32), np.array([3, 4], np.int32), 5)
    assert recorder.seen
    assert not missing(recorder.seen)


def test_no_product_has_a_boolean_which_directml_would_answer_with_booleans():
    operands = set()

    class Operands(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in {"mul", "mul_", "add", "add_", "sub", "sub_"}:
                operands.update(a.dtype for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    sampler = TorchSampler(torch.device("cpu"), 40)
    with Operands():
        sampler.sample(torch.randn(1, 40), sampling_rows([Row(top_k=3, top_p=0.5), Row(allowed={1})], 40))
        sampler.logprobs(torch.randn(1, 40), np.zeros(1, np.int32), np.ones(1, np.int32), 5)
    assert operands == {torch.float32, torch.int64}


def test_nothing_is_computed_in_float64_which_few_devices_have():
    kinds = set()

    class Kinds(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            kinds.update(t.dtype for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Kinds():
        TorchSampler(torch.device("cpu"), 40).sample(torch.randn(1, 40), sampling_rows([Row(top_k=3, top_p=0.5)], 40))
    assert torch.float32 in kinds
    assert torch.float64 not in kinds


def test_an_operator_that_directml_lacks_would_be_seen():
    with Recorder() as recorder:
        torch.bitwise_right_shift(torch.arange(4), 1)
        torch.logcumsumexp(torch.arange(4.0), 0)
    assert missing(recorder.seen) == {"bitwise_right_shift", "logcumsumexp"}
