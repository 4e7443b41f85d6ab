"""Compiles what any engine needs, whatever its model, into the cache; run by `compiling_ahead_main`.

Sampling, drafting and their figures are as much to compile as a model's own step.  At a first start a process of its own
compiles them on another core, while the engine's compiles the rest, and then finds them.  Knows nothing about who needs what
it leaves.
"""

import io
import os
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

import msgspec
import torch

from helix_gateway.core.kv import KVGroup
from helix_gateway.core.step import Int32s, LogprobRows, SamplingRows, StepBatch
from helix_gateway.engine.engine import Engine, EngineLimits
from helix_gateway.runtime.cpu.compile_cache import write_in_turn
from helix_gateway.runtime.cpu.compiled import mark_compiled_ahead
from helix_gateway.runtime.sampling import make_sampler
from helix_gateway.service.host import EngineHost
from helix_gateway.service.self_drafting import mark_compiled_for
from helix_gateway.service.settings import EngineSettings
from helix_gateway.service.speculation import make_speculation
from helix_gateway.service.tiny_model import write_tiny_model
from helix_gateway.service.warm_up import warm_up

_ROWS = 16
_TINY_POOL_BYTES = 4 << 20
_NICENESS = 10


class NoModel:
    """A `core.protocols.ModelRunner` whose every token is as likely as any other; nothing is computed or stored."""

    vocab_size = 64
    num_pages = 16
    kv_groups: Sequence[KVGroup] = (KVGroup("none", 16, None),)

    def __init__(self) -> None:
        self._sampler = make_sampler(torch.device("cpu"), self.vocab_size)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """See `ModelRunner`."""

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """See `ModelRunner`."""
        return torch.zeros(len(batch.logits_rows), self.vocab_size)

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> Int32s:
        """See `ModelRunner`."""
        return self._sampler.sample(logits, rows)

    def logprobs(self, logits: torch.Tensor, logits_index: Int32s, token_ids: Int32s, top: int) -> LogprobRows:
        """See `ModelRunner`."""
        return self._sampler.logprobs(logits, logits_index, token_ids, top)


def compile_ahead() -> None:
    """Let an engine of no model serve what every engine serves first."""
    write_in_turn()
    runner = NoModel()
    speculation = make_speculation(EngineSettings(model_path=""), runner, _ROWS)
    limits = EngineLimits(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=_ROWS, max_queue_len=4)
    engine = Engine(runner, limits, drafter=speculation.drafter, depth_policy=speculation.depth_policy)
    warm_up(engine)
    mark_compiled_ahead()


def compile_fewer_bits(kv_dtype: str) -> None:
    """Let a tiny float model draft by its own weights at fewer bits, over keys and values of some dtype.

    Whoever serves meanwhile comes first.
    """
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    with tempfile.TemporaryDirectory(prefix="helix-tiny-") as folder, redirect_stderr(io.StringIO()):
        path = str(write_tiny_model(Path(folder)))
        asked = {"dtype": "float32", "kv_cache_dtype": kv_dtype, "kv_cache_memory_bytes": _TINY_POOL_BYTES}
        EngineHost(msgspec.convert({"model_path": path, "speculation": "self", **asked}, EngineSettings))
    mark_compiled_for(kv_dtype)
