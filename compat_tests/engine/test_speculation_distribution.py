"""The next two and three tokens come as often as the model's own probabilities say, whatever is drafted.

The joint distribution over three tokens is enumerated by the definition: for each beginning the probabilities that
`sampling_reference` computes under the option, with penalties counted here anew, and their product.  Tens of thousands
of choices of one request are decoded by the decoder itself, and their beginnings counted (chi-squared).  The seed is
fixed.  Bugs put in on purpose are seen.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from compat_tests.effort import usually
from compat_tests.engine.speculation_faults import FAULTS
from compat_tests.runtime.sampling_reference import Row, probabilities
from helix_gateway.core.kv import KVGroup
from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.engine.decoder import AdaptiveSpeculativeDecoder
from helix_gateway.engine.depth import FixedDepth
from helix_gateway.engine.drafters.base import DraftTokens
from helix_gateway.engine.plan import ScheduledSequence, StepPlan
from helix_gateway.engine.sequence import Sequence, Timeline
from helix_gateway.runtime.sampling import make_sampler

VOCAB, LENGTH = 6, 3
PROMPT = (1, 4)
SAMPLES = 50_000
LIKELY, IMPOSSIBLE = 1e-4, 1e-12
"""A sound decoder falls below the first once in ten thousand sets of seeds, a broken one far below the second."""
TABLE = np.random.default_rng(8).normal(0, 1.2, (LENGTH + 1, VOCAB, VOCAB)).astype(np.float32)
"""Logits by how many tokens are out and what the last one is."""

OPTIONS = {
    "plain": {},
    "filters": {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.03},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.8, "frequency_penalty": 0.7, "logit_bias": {2: 0.5}},
    "bans": {"bad_words": ((3,), (0, 5)), "min_tokens": 2, "stop_token_ids": (4,)},
}


class TableRunner:
    """core.protocols.ModelRunner of a model whose logits stand in a table."""

    kv_groups = (KVGroup("none", 16, None),)
    num_pages = 1
    vocab_size = VOCAB

    def __init__(self):
        self._sampler = make_sampler(torch.device("cpu"), VOCAB)

    def copy_pages(self, copies):
        assert not copies

    def forward(self, batch):
        rows = batch.logits_rows
        out = np.minimum(batch.positions[rows] - len(PROMPT) + 1, LENGTH)
        return torch.from_numpy(TABLE[out, batch.token_ids[rows]])

    def sample(self, logits, rows):
        return self._sampler.sample(logits, rows)


class NoCache:
    """As much of a `PagedKVCache` as a model without KV needs."""

    def tables(self, key):
        return ()


# ---- what must come out


def edits_after(params, out):
    """Scale and shift for each token after the tokens of the output, by the definition of each option."""
    edits = {}
    for token in range(VOCAB):
        seen = token in (*PROMPT, *out)
        shift = params.logit_bias.get(token, 0.0) - params.presence_penalty * (token in out)
        shift -= params.frequency_penalty * out.count(token)
        banned = any(word[-1] == token and (*out, token)[-len(word) :] == word for word in params.bad_words)
        if banned or (token in params.stop_token_ids and len(out) < params.min_tokens):
            shift = -np.inf
        edits[token] = (params.repetition_penalty if seen else 1.0, shift)
    return edits


def next_token(params, out):
    """The probability of each token after the tokens of an output."""
    row = Row(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        edits=edits_after(params, out),
    )
    return probabilities(TABLE[len(out), (*PROMPT, *out)[-1]], row)


@cache
def joint(option, length):
    """The probability of each beginning of so many tokens."""
    params = SamplingParams(**OPTIONS[option])
    known = {(): 1.0}
    for _ in range(length):
        known = {(*out, token): p * q for out, p in known.items() for token, q in enumerate(next_token(params, out))}
    assert sum(known.values()) == pytest.approx(1.0)
    return known


def fit(outputs, option, length):
    """p-value of the first ``length`` tokens of many outputs; 0 where one came that cannot."""
    expected = joint(option, length)
    counts = Counter(output[:length] for output in outputs)
    if any(expected[output] == 0 for output in counts):
        return 0.0
    # Beginnings that are expected less than ten times share a cell, as the approximation wants it.
    wanted = {output: p * len(outputs) for output, p in expected.items() if p > 0}
    rare = [output for output, count in wanted.items() if count < 10]
    cells = [([output], count) for output, count in wanted.items() if count >= 10]
    if sum(wanted[output] for output in rare) >= 10:
        cells.append((rare, sum(wanted[output] for output in rare)))
    else:
        common, count = max(cells, key=lambda cell: cell[1])
        cells[cells.index((common, count))] = (common + rare, count + sum(wanted[output] for output in rare))
    observed = [sum(counts[output] for output in members) for members, _ in cells]
    return float(stats.chisquare(observed, [count for _, count in cells]).pvalue)


# ---- who drafts


@dataclass
class Scripted:
    """Drafts two tokens from a function of a sequence and its output."""

    next_token: object

    def propose(self, sequences, depths):
        return [self._draft(sequence, depth) for sequence, depth in zip(sequences, depths, strict=True)]

    def _draft(self, sequence, depth):
        out = tuple(sequence.token_ids[len(PROMPT) :])
        drafts = []
        for _ in range(depth):
            drafts.append(self.next_token(sequence, (*out, *drafts)))
        return DraftTokens("scripted", np.array(drafts, np.int32), np.full(depth, 0.9, np.float32))

    def retire(self, sequence):
        pass


@cache
def ranked(option, out):
    return tuple(np.argsort(next_token(SamplingParams(**OPTIONS[option]), out), kind="stable"))


def drafter(kind, option):
    """``right`` is told what each sequence says without speculation; the others look at the probabilities only."""
    if kind == "right":
        known = plain_outputs(option)
        return Scripted(lambda sequence, out: known[sequence.index][len(out)])
    if kind == "likeliest":
        return Scripted(lambda sequence, out: int(ranked(option, out)[-1]))
    if kind == "least likely":
        return Scripted(lambda sequence, out: int(ranked(option, out)[0]))
    assert kind == "by chance"
    return Scripted(lambda sequence, out: hash((sequence.index, len(out))) % VOCAB)


def outputs_of(option, drafts=None, *, depth=LENGTH - 1, samples=SAMPLES):
    """The first tokens of so many choices, as the decoder makes them; and what came of drafts."""
    decoder = AdaptiveSpeculativeDecoder(TableRunner(), drafts, FixedDepth(depth), NoCache())
    params = SamplingParams(**OPTIONS[option], seed=20, ignore_eos=True)
    request = Request(request_id="", prompt_token_ids=[*PROMPT], sampling=params)
    sequences = [
        Sequence(
            request=request,
            index=index,
            arrival_order=0,
            stop_ids=frozenset(params.stop_token_ids),
            stop=None,
            constraint=None,
            timeline=Timeline(arrival=0.0),
        )
        for index in range(samples)
    ]
    going = sequences
    while going:
        scheduled = [
            ScheduledSequence(s, len(s.token_ids) - 1, 1, min(depth, LENGTH - 1 - s.num_output_tokens)) for s in going
        ]
        tokens = decoder.speculative_decode_step(StepPlan(scheduled)).accepted_tokens
        for sequence, accepted in zip(going, tokens, strict=True):
            sequence.append(accepted, 0.0)
        going = [sequence for sequence in going if sequence.num_output_tokens < LENGTH]
    return [tuple(sequence.token_ids[len(PROMPT) :]) for sequence in sequences], decoder.ledger


@cache
def plain_outputs(option):
    return outputs_of(option, depth=0)[0]


# ---- whether it does


@pytest.mark.parametrize("option", [usually(option, option == "penalties") for option in OPTIONS])
def test_without_speculation_tokens_come_as_often_as_the_model_says(option):
    for length in (2, 3):
        assert fit(plain_outputs(option), option, length) > LIKELY


USUAL = {("penalties", "right"), ("penalties", "least likely"), ("filters", "likeliest"), ("bans", "by chance")}
CASES = [usually(case, case in USUAL) for case in product(OPTIONS, ("right", "likeliest", "by chance", "least likely"))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_speculation_they_come_as_often(case):
    option, kind = case
    outputs, ledger = outputs_of(option, drafter(kind, option))
    for length in (2, 3):
        assert fit(outputs, option, length) > LIKELY
    counts = ledger.counts()["scripted"]
    accepted = counts.num_accepted_tokens / counts.num_draft_tokens
    assert accepted == 1.0 if kind == "right" else 0.0 <= accepted < 0.9


def test_a_slightly_different_distribution_would_be_seen():
    outputs = plain_outputs("penalties")
    # One output in twenty is another one.
    changed = [outputs[0] if number % 20 == 0 else output for number, output in enumerate(outputs)]
    for length in (2, 3):
        assert fit(changed, "penalties", length) < IMPOSSIBLE


@pytest.mark.parametrize("fault", FAULTS)
def test_a_known_bug_would_be_seen(fault, monkeypatch):
    FAULTS[fault](monkeypatch)
    outputs, _ = outputs_of("penalties", drafter("likeliest", "penalties"), samples=SAMPLES // 3)
    assert fit(outputs, "penalties", 3) < IMPOSSIBLE
