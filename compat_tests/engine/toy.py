"""A model of a few lines for the engine's tests: its "KV" is the tokens themselves, kept in pages.

Logits are a hash of the tokens that each row reads through its block tables, so a wrong table, a block shared
that should not be, a missed copy or a window given back too early changes the output.  Tokens are chosen from them by
the sampler that serves on a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from helix_gateway.core.kv import KVGroup
from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.core.step import SamplingRows, StepBatch
from helix_gateway.engine.drafters.base import DraftTokens
from helix_gateway.engine.engine import Engine, EngineLimits
from helix_gateway.engine.sequence import Sequence as EngineSequence
from helix_gateway.runtime.sampling import make_sampler

VOCAB = 50
EOS = 0


@dataclass
class ToyRunner:
    """core.protocols.ModelRunner over pages that hold token ids."""

    kv_groups: Sequence[KVGroup]
    num_pages: int
    vocab_size: int = VOCAB
    batches: list[StepBatch] = field(default_factory=list)

    def __post_init__(self):
        size = max(group.tokens_per_block for group in self.kv_groups)
        self.pages = np.full((self.num_pages, size), -1, np.int64)
        self.sampler = make_sampler(torch.device("cpu"), self.vocab_size)

    def copy_pages(self, copies):
        for source, destination in copies:
            self.pages[destination] = self.pages[source]

    def forward(self, batch):
        self.batches.append(batch)
        rows = []
        for s in range(len(batch.context_lens)):
            for row in range(batch.cu_seqlens[s], batch.cu_seqlens[s + 1]):
                self._write(batch, s, row)
        for s in range(len(batch.context_lens)):
            for row in range(batch.cu_seqlens[s], batch.cu_seqlens[s + 1]):
                rows.append(self._logits(batch, s, row))
        return np.array(rows, np.float32)[batch.logits_rows]

    def _write(self, batch, s, row):
        position = batch.positions[row]
        for group, table in zip(self.kv_groups, batch.block_tables, strict=True):
            entry, offset = divmod(position, group.tokens_per_block)
            self.pages[table[s, entry], offset] = batch.token_ids[row]

    def _logits(self, batch, s, row):
        seen = []
        position = batch.positions[row]
        for group, table in zip(self.kv_groups, batch.block_tables, strict=True):
            first = 0 if group.window is None else max(0, position - group.window + 1)
            places = [divmod(p, group.tokens_per_block) for p in range(first, position + 1)]
            seen.append(tuple(int(self.pages[table[s, entry], offset]) for entry, offset in places))
        return logits_after(seen, self.vocab_size)

    def sample(self, logits, rows: SamplingRows):
        return self.sampler.sample(torch.from_numpy(logits), rows)

    def logprobs(self, logits, logits_index, token_ids, top):
        return self.sampler.logprobs(torch.from_numpy(logits), logits_index, token_ids, top)


def logits_after(seen, vocab_size=VOCAB):
    """What a model of one group with no window says after some tokens; ``seen``: [the tokens read], for each group."""
    return np.random.default_rng(abs(hash(tuple(seen)))).normal(0, 2, vocab_size)


ONE_GROUP = (KVGroup("full", 4, None),)
TWO_GROUPS = (KVGroup("full", 4, None), KVGroup("window", 6, 5))


def make_engine(
    num_pages=200, groups=ONE_GROUP, *, budget=16, max_num_seqs=8, max_model_len=200, runner=None, **options
):
    limits = EngineLimits(
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_queue_len=1000
    )
    runner = runner or ToyRunner(groups, num_pages)
    return checked(Engine(runner, limits, eos_token_ids=frozenset({EOS}), **options))


def checked(engine):
    """Let the engine check its accounts before each step, when it is known what will be written."""
    decode = engine._decoder.speculative_decode_step

    def check_and_decode(plan):
        engine.check(plan)
        return decode(plan)

    engine._decoder.speculative_decode_step = check_and_decode
    return engine


def request(request_id, prompt, *, priority=0, cache_salt="", max_depth=None, **sampling):
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(**{"max_tokens": 8, **sampling}),
        priority=priority,
        cache_salt=cache_salt,
        max_depth=max_depth,
    )


@dataclass
class Answer:
    """All events of one choice, put together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list | None = None
    last: object = None


class Answers(dict):
    """(request id, index) to Answer."""

    def take(self, events):
        for event in events:
            answer = self.setdefault((event.request_id, event.index), Answer())
            assert answer.last is None, "an event after the last one"
            answer.token_ids += event.token_ids
            answer.logprobs += event.logprobs or []
            answer.prompt_logprobs = event.prompt_logprobs or answer.prompt_logprobs
            answer.last = event if event.finish_reason else None


def drain(engine, answers=None, *, max_steps=5000):
    """Step until idle, checking the cache after every step."""
    answers = Answers() if answers is None else answers
    for _ in range(max_steps):
        if not engine.has_work():
            return answers
        answers.take(engine.step())
        engine.check()
    raise AssertionError("the engine does not come to an end")


def alone(request_, groups=ONE_GROUP):
    """What a request gets by itself: a large pool, no caching, whole prompts at once."""
    engine = make_engine(400, groups, budget=500, enable_prefix_caching=False)
    engine.submit(request_)
    return drain(engine)


@dataclass
class ScriptedDrafter:
    """Proposes from a function of a sequence's tokens."""

    next_token: object
    name: str = "scripted"

    def propose(self, sequences: Sequence[EngineSequence], depths):
        proposals = []
        for sequence, depth in zip(sequences, depths, strict=True):
            tokens = list(sequence.token_ids)
            for _ in range(depth):
                tokens.append(self.next_token(sequence, tokens))
            proposal = np.array(tokens[len(sequence.token_ids) :], np.int32)
            proposals.append(DraftTokens(self.name, proposal, np.full(len(proposal), 0.9, np.float32)))
        return proposals

    def retire(self, sequence):
        pass
