"""Compiled attention over pages: equal to the formula, and each row's bits a matter of its own sequence alone."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from llvmlite import binding
from numba import njit

from compat_tests.effort import usually
from helix_gateway.core.errors import ModelLoadError
from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.cpu import attention_int8_kernels, wide_products
from helix_gateway.runtime.cpu.attention import CpuPagedAttention
from helix_gateway.runtime.groups import LayerShape, group_layers
from helix_gateway.runtime.pages import Arena, lay_out_pages
from helix_gateway.runtime.torch_attention import TorchPagedAttention

CPU = torch.device("cpu")
LENGTHS = (37, 5, 90)
LAYERS = 2
SCALING = 0.2


def formula(query, key, value, window, softcap):
    """Attention [rows, heads, dim] of one sequence, in float64."""
    group = query.shape[0] // key.shape[0]
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.repeat_interleave(group, 0).transpose(1, 2) * SCALING
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(len(scores[0]))[:, None] - torch.arange(len(scores[0]))
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(group, 0)).transpose(0, 1)


def quantised(rows):
    """What int8 pages hold of [heads, rows, dim]: 127 steps to the largest number of each row and head."""
    steps = rows.double().abs().amax(2, keepdim=True) / 127
    return torch.round(rows.double() / steps) * steps


class Case:
    """Random queries, keys and values of some sequences, attended in chunks over scattered pages."""

    def __init__(
        self,
        heads,
        kv_heads,
        key_dim,
        value_dim,
        window=None,
        softcap=None,
        dtype=torch.float32,
        stored=None,
        lengths=LENGTHS,
    ):
        self.heads, self.softcap, self.lengths = heads, softcap, lengths
        self.dtype, self.stored = dtype, stored or dtype
        self.shape = LayerShape(kv_heads, key_dim, value_dim, window)
        source = torch.Generator().manual_seed(0)
        self.rows = [
            [torch.randn(count, length, dim, generator=source).to(dtype) for length in lengths]
            for count, dim in ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
        ]

    def wanted(self):
        query, key, value = self.rows
        if self.stored == torch.int8:
            key, value = ([quantised(rows) for rows in side] for side in (key, value))
        return [formula(*rows, self.shape.window, self.softcap) for rows in zip(query, key, value)]

    @property
    def tolerance(self):
        if torch.bfloat16 in (self.dtype, self.stored):
            return 0.02
        return 1e-3 if self.stored == torch.int8 else 1e-5

    def attend(self, block_size, chunk, device_independent=False):
        layout = lay_out_pages(group_layers("m", [self.shape] * LAYERS), block_size, self.stored)
        blocks = [-(-length // layout.groups[0].tokens_per_block) for length in self.lengths]
        if device_independent:
            arena = Arena.page_major(layout, sum(blocks) + 1, CPU)
            attention = TorchPagedAttention(arena, layout.groups, [self.heads] * LAYERS)
        else:
            arena = Arena.slice_major(layout, sum(blocks) + 1, CPU)
            attention = CpuPagedAttention(arena, layout.groups, [self.heads] * LAYERS)
            arena.memory.view(torch.uint8).fill_(255)  # NaN: what is not written must not be read
        pages = iter(np.random.default_rng(chunk).permutation(sum(blocks)) + 1)
        table = np.zeros((len(self.lengths), max(blocks)), np.int32)
        for row, count in enumerate(blocks):
            table[row, :count] = [next(pages) for _ in range(count)]
        outputs = [[] for _ in self.lengths]
        for first in range(0, max(self.lengths), chunk):
            spans = [(s, first, min(first + chunk, n)) for s, n in enumerate(self.lengths) if first < n]
            attention.begin(step_of(spans, table))
            query, key, value = (torch.cat([rows[s][:, a:b] for s, a, b in spans], 1)[None] for rows in self.rows)
            for layer in range(LAYERS):
                out = attention.attend(layer, query, key, value, SCALING, self.softcap)
            row = 0
            for s, a, b in spans:
                outputs[s].append(out[0, row : row + b - a])
                row += b - a
        return [torch.cat(parts) for parts in outputs]


def step_of(spans, table):
    positions = np.concatenate([np.arange(a, b, dtype=np.int32) for _, a, b in spans])
    return StepBatch(
        token_ids=positions,
        positions=positions,
        cu_seqlens=np.cumsum([0] + [b - a for _, a, b in spans]).astype(np.int32),
        context_lens=np.array([b for *_, b in spans], np.int32),
        block_tables=(table[[s for s, *_ in spans]],),
        logits_rows=positions[:0],
    )


CASES = {
    "grouped heads": Case(9, 3, 64, 64),
    "one head a group": Case(4, 4, 8, 16),
    "many heads a group, odd dims": Case(14, 2, 20, 24),
    "large heads": Case(4, 1, 256, 256),
    "different dims": Case(8, 2, 96, 128),
    "window": Case(6, 2, 32, 32, window=7),
    "window of one": Case(2, 2, 16, 16, window=1),
    "softcap": Case(4, 2, 32, 32, softcap=3.0),
    "bfloat16": Case(6, 2, 64, 64, dtype=torch.bfloat16),
    "bfloat16 rows, float32 pages": Case(6, 2, 20, 24, dtype=torch.bfloat16, stored=torch.float32),
    "float32 rows, bfloat16 pages": Case(6, 2, 64, 64, window=30, stored=torch.bfloat16),
    "int8": Case(9, 3, 64, 64, stored=torch.int8),
    "int8, one head a group, odd dims": Case(3, 3, 20, 24, stored=torch.int8),
    "int8, dims of no fours": Case(4, 2, 18, 7, stored=torch.int8),
    "int8, many heads a group, one dim after another": Case(14, 2, 80, 96, stored=torch.int8),
    "int8, large heads": Case(4, 1, 256, 128, stored=torch.int8),
    "int8, window and softcap": Case(8, 2, 32, 32, window=7, softcap=3.0, stored=torch.int8),
    "int8, window of one": Case(2, 2, 16, 16, window=1, stored=torch.int8),
    "int8, bfloat16 rows": Case(8, 2, 64, 64, window=40, dtype=torch.bfloat16, stored=torch.int8),
    "bfloat16, all at once": Case(10, 2, 24, 24, window=20, softcap=3.0, dtype=torch.bfloat16),
}
CUTS = [(16, 64), (16, 1), (1, 7), (5, 90), (24, 13), (32, 4)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_formula_whatever_the_blocks_and_chunks_bit_for_bit(name):
    case = CASES[name]
    wanted = case.wanted()
    first = None
    for block_size, chunk in CUTS:
        got = case.attend(block_size, chunk)
        for mine, theirs in zip(got, wanted):
            torch.testing.assert_close(mine.double(), theirs, rtol=case.tolerance, atol=case.tolerance)
        first = first or got
        for mine, theirs in zip(got, first):
            assert torch.equal(mine, theirs), (block_size, chunk)


@pytest.mark.parametrize("name", CASES)
def test_the_torch_path_agrees(name):
    case = CASES[name]
    tolerance = 0.05 if torch.bfloat16 in (case.dtype, case.stored) else case.tolerance
    for block_size, chunk in ((16, 64), (5, 7)):
        for mine, theirs in zip(case.attend(block_size, chunk, device_independent=True), case.wanted()):
            torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["grouped heads", "int8"])
def test_threads_change_no_bit(name, monkeypatch):
    case, outputs = CASES[name], []
    for threads in (1, 2, 5):
        monkeypatch.setattr("helix_gateway.runtime.cpu.attention.configure_threads", lambda count=threads: count)
        outputs.append(case.attend(16, 30))
    for others in outputs[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(others, outputs[0]))


@pytest.mark.parametrize("stored, factor", [(torch.float32, 1000), (torch.int8, 100)])
def test_scores_that_overflow_an_exponential_do_no_harm(stored, factor):
    case = Case(2, 1, 16, 16, stored=stored)
    case.rows[0] = [rows * factor for rows in case.rows[0]]  # int8: queries of 16 bits, so scores keep four digits
    for mine, theirs in zip(case.attend(16, 30), case.wanted()):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-2, atol=1e-2)  # scores of thousands keep three digits


@pytest.mark.parametrize("features", [frozenset(), None], ids=["any processor", "this one"])
@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("sixteens", [1, 3])
def test_bytes_go_to_every_fourth_place_and_nowhere_else(features, slot, sixteens, monkeypatch):
    if features is not None:
        monkeypatch.setattr(attention_int8_kernels, "target_features", lambda: features)

    @njit
    def spread(source, target, count):
        attention_int8_kernels.spread_bytes(source, target, count)

    numbers = np.arange(100, 100 + 16 * sixteens, dtype=np.uint8)
    room = np.full(64 * sixteens + 64, 77, np.uint8)
    spread(numbers.ctypes.data, room.ctypes.data + slot, sixteens)
    assert np.array_equal(room[slot : 64 * sixteens : 4], numbers)
    room[slot : 64 * sixteens : 4] = 77
    assert (room == 77).all()


OTHER_PROCESSOR = """
import sys
from helix_gateway.runtime.cpu import integer_dot
integer_dot.host_dot = lambda: sys.argv[1]
import numpy as np
from compat_tests.runtime.test_cpu_attention import int8_outputs
np.savez(sys.argv[2], *int8_outputs())
"""


def int8_outputs():
    """Of short rows, and of ones with more tokens, in pages and in a unit, than AVX2's sums hold."""
    long = Case(3, 1, 16, 16, stored=torch.int8, lengths=(600, 270))
    outputs = [*CASES["int8"].attend(16, 30), *long.attend(16, 300), *long.attend(512, 300)]
    for mine, theirs in zip(outputs[-2:], long.wanted()):
        torch.testing.assert_close(mine.double(), theirs, rtol=long.tolerance, atol=long.tolerance)
    return [output.numpy() for output in outputs]


@pytest.mark.parametrize("instructions", [usually("avx2", True), usually("portable", False)])
def test_int8_pages_give_the_same_bits_with_older_instructions(instructions, tmp_path):
    if instructions == "avx2" and not binding.get_host_cpu_features().get("avx2"):
        pytest.skip("this processor has no AVX2")
    code = [sys.executable, "-c", OTHER_PROCESSOR, instructions, str(tmp_path / "outputs.npz")]
    subprocess.run(code, check=True, env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)})
    with np.load(tmp_path / "outputs.npz") as outputs:
        for mine, name in zip(int8_outputs(), outputs.files, strict=True):
            assert np.array_equal(mine, outputs[name])


def test_keys_that_sums_cannot_hold_are_refused(monkeypatch):
    monkeypatch.setattr(wide_products.HOST_WIDE, "most_dims", 64)
    Case(2, 1, 64, 16, stored=torch.int8).attend(16, 30)
    Case(2, 1, 80, 16).attend(16, 30)
    with pytest.raises(ModelLoadError, match=r"80 dimensions.*--kv-cache-dtype bfloat16"):
        Case(2, 1, 80, 16, stored=torch.int8).attend(16, 30)
