"""A pool of pages for tests of the runner: sequences computed in any chunks, their pages scattered at random."""

import numpy as np
import torch

from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.cpu.layers import Angles


def turn_wrongly_from(position, step_class, monkeypatch):
    """Let a compiled step turn queries and keys by wrong angles from a position on."""
    right = step_class._angles

    def wrong(self, longest):
        cosines, sines = right(self, longest)
        cosines = cosines.copy()
        cosines[:, position:] = 1
        return Angles(cosines, sines)

    monkeypatch.setattr(step_class, "_angles", wrong)


class Feeder:
    """Feeds token sequences to a runner step by step, as an engine would, and collects every row's logits."""

    def __init__(self, runner, sequences, seed=0):
        self.runner = runner
        self.sequences = [np.asarray(tokens, np.int32) for tokens in sequences]
        self.done = [0] * len(sequences)
        self.logits = [[] for _ in sequences]
        free = list(np.random.default_rng(seed).permutation(np.arange(1, runner.num_pages)))
        self.tables = []
        for group in runner.kv_groups:
            longest = max(-(-len(tokens) // group.tokens_per_block) for tokens in self.sequences)
            table = np.zeros((len(sequences), longest), np.int32)
            for row, tokens in enumerate(self.sequences):
                for block in range(-(-len(tokens) // group.tokens_per_block)):
                    table[row, block] = free.pop()
            self.tables.append(table)

    def batch(self, spans):
        """The StepBatch that computes ``(sequence, first, last)`` spans and wants all rows' logits."""
        positions = np.concatenate([np.arange(first, last, dtype=np.int32) for _, first, last in spans])
        members = [sequence for sequence, _, _ in spans]
        return StepBatch(
            token_ids=np.concatenate([self.sequences[s][first:last] for s, first, last in spans]),
            positions=positions,
            cu_seqlens=np.cumsum([0] + [last - first for _, first, last in spans]).astype(np.int32),
            context_lens=np.array([last for _, _, last in spans], np.int32),
            block_tables=tuple(table[members] for table in self.tables),
            logits_rows=np.arange(len(positions), dtype=np.int32),
        )

    def step(self, spans):
        """Compute spans and keep their logits."""
        logits, row = self.runner.forward(self.batch(spans)), 0
        for sequence, first, last in spans:
            assert first == self.done[sequence]
            self.logits[sequence].append(logits[row : row + last - first])
            self.done[sequence] = last
            row += last - first

    def run(self, chunk, at_once):
        """Compute everything, ``chunk`` tokens of up to ``at_once`` sequences a step; logits of each sequence."""
        while any(done < len(tokens) for done, tokens in zip(self.done, self.sequences)):
            waiting = [s for s, tokens in enumerate(self.sequences) if self.done[s] < len(tokens)][:at_once]
            self.step([(s, self.done[s], min(len(self.sequences[s]), self.done[s] + chunk)) for s in waiting])
        return [torch.cat(parts) for parts in self.logits]


def random_sequences(lengths, seed=0, vocab_size=256):
    """Token ids that avoid the special ones."""
    dice = np.random.default_rng(seed)
    return [dice.integers(3, vocab_size, length).astype(np.int32) for length in lengths]
