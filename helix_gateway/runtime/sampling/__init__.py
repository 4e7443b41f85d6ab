"""Choosing tokens from logits on a device: one sampler a device, all with the same answers.

`make_sampler` picks the compiled one for a CPU and the one of torch operators for everything else.
Knows nothing about requests, sequences or scheduling.
"""

from typing import Protocol

import torch

from helix_gateway.core.step import Int32s, LogprobRows, SamplingRows
from helix_gateway.runtime.sampling.cpu_sampler import CpuSampler
from helix_gateway.runtime.sampling.torch_sampler import TorchSampler

__all__ = ["Sampler", "make_sampler"]


class Sampler(Protocol):
    """What a runner needs for `ModelRunner.sample` and `ModelRunner.logprobs`."""

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> Int32s:
        """Choose one token for each sampling row: int32 [num_samples]; the logits stay as they are."""

    def logprobs(self, logits: torch.Tensor, logits_index: Int32s, token_ids: Int32s, top: int) -> LogprobRows:
        """Raw log-probabilities of one token for each of the given rows, and the ``top`` likeliest of each."""


def make_sampler(device: torch.device, vocab_size: int) -> Sampler:
    """A sampler for float32 logits ``[rows, vocab_size]`` that lie on ``device``."""
    return CpuSampler(vocab_size) if device.type == "cpu" else TorchSampler(device, vocab_size)
