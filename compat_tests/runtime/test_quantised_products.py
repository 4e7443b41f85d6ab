"""Quantised products: the very numbers of a file, exact integer sums in every instruction set, rows that are their own."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numba import njit

from helix_gateway.runtime.cpu.dot_products import DOT_PRODUCTS, usable_dot_products
from helix_gateway.runtime.cpu.instruction_sets import is_x86
from helix_gateway.runtime.cpu.layers import gate_row
from helix_gateway.runtime.cpu.quantised_kernels import (
    INT4,
    INT8,
    INT8_CHANNELS,
    groups_together,
    multiply_quantised_tile,
)
from helix_gateway.runtime.cpu.quantised_products import quantise_rows
from helix_gateway.runtime.cpu.quantised_rows import num_groups, quantise_gated_row, quantise_row, rows_bytes
from helix_gateway.runtime.cpu.quantised_weights import Int4Weight, Int8ChannelWeight, Int8Weight

FORMATS = [Int8Weight, Int4Weight, Int8ChannelWeight]
SHAPES = [(1, 1), (31, 7), (32, 32), (33, 64), (65, 129), (192, 576), (96, 1536)]
"""(channels, inputs): tiles and groups whole and broken."""
BLOCK_BYTES = {
    gguf.GGMLQuantizationType.Q4_0: 18,
    gguf.GGMLQuantizationType.Q4_1: 20,
    gguf.GGMLQuantizationType.Q8_0: 34,
}


def random_matrix(rows, inputs, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, inputs), dtype=np.float32))


def rounded(x, size):
    """Rows as int8 in groups of a size with a scale each, in torch, by the definition; float64, as far as it is exact."""
    inputs = x.shape[1]
    groups = torch.nn.functional.pad(x, (0, -inputs % size)).view(len(x), -1, size)
    top = groups.abs().amax(2, keepdim=True)
    top = torch.where(top > 1e-30, top, 127.0)
    steps = torch.round(groups * (torch.tensor(127.0) / top))
    return (steps.double() * (top / 127).double()).view(len(x), -1)[:, :inputs]


def size_of(weight):
    """Magnitudes that the products go through: a minimum and what is added to it may be larger than a weight."""
    matrix = weight.unpacked().double().abs()
    return matrix + 2 * matrix.amax() if weight.format == INT4 else matrix


def assert_is_the_product(got, weight, x, bias):
    """Within what float32 sums over groups may lose."""
    activations, matrix = rounded(x, 32 * groups_together(weight.format)), weight.unpacked().double()
    exact = activations @ matrix.T + bias.double()
    size = activations.abs() @ size_of(weight).T + bias.double().abs()
    bound = size * torch.finfo(torch.float32).eps * (2 * weight.groups + 4)
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_the_rounded_row_and_the_unpacked_matrix(kind, shape):
    weight = kind.from_float(random_matrix(*shape))
    bias = torch.linspace(-1, 1, shape[0])
    for rows in (1, 2, 5, 12, 13, 40):
        x = random_matrix(rows, shape[1], seed=rows)
        assert_is_the_product(weight.multiply(x, weight.padded_bias(bias)), weight, x, bias)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_has_the_same_bits_in_every_batch(kind):
    weight = kind.from_float(random_matrix(96, 640))
    bias, x = weight.padded_bias(None), random_matrix(64, 640, seed=1)
    alone = torch.cat([weight.multiply(row[None], bias) for row in x])
    dice = np.random.default_rng(2)
    for rows in range(1, 65):
        chosen = torch.from_numpy(dice.permutation(64)[:rows])
        assert torch.equal(weight.multiply(x[chosen], bias), alone[chosen])


@pytest.mark.parametrize("kind", FORMATS)
def test_zero_tiny_and_no_rows(kind):
    weight = kind.from_float(random_matrix(40, 70))
    bias = weight.padded_bias(torch.arange(40.0))
    assert weight.multiply(torch.zeros(0, 70), bias).shape == (0, 40)
    for x in (torch.zeros(2, 70), torch.full((2, 70), 1e-38)):
        assert torch.equal(weight.multiply(x, bias), torch.arange(40.0).expand(2, 40))


@pytest.mark.parametrize(
    "kind, type_",
    [
        (Int4Weight, gguf.GGMLQuantizationType.Q4_0),
        (Int4Weight, gguf.GGMLQuantizationType.Q4_1),
        (Int8Weight, gguf.GGMLQuantizationType.Q8_0),
    ],
)
@pytest.mark.parametrize("channels", [5, 64, 100])
def test_a_files_blocks_keep_their_very_numbers(kind, type_, channels):
    blocks = gguf.quants.quantize(random_matrix(channels, 96).numpy(), type_)
    weight = kind.from_blocks(blocks.reshape(channels, 3, BLOCK_BYTES[type_]))
    assert np.array_equal(weight.unpacked().numpy(), gguf.quants.dequantize(blocks, type_))


def test_blocks_of_any_bits_come_through():
    """Whatever a file may hold: all nibbles, -128, subnormal and negative scales."""
    dice = np.random.default_rng(3)
    for kind, size in ((Int4Weight, 20), (Int8Weight, 34)):
        blocks = dice.integers(0, 256, (40, 2, size), dtype=np.uint8)
        blocks[..., 1] &= 0xBB  # no infinite scales
        if size == 20:
            blocks[..., 3] &= 0xBB
        type_ = gguf.GGMLQuantizationType.Q4_1 if size == 20 else gguf.GGMLQuantizationType.Q8_0
        weight = kind.from_blocks(blocks)
        assert np.array_equal(weight.unpacked().numpy(), gguf.quants.dequantize(blocks.reshape(40, -1), type_))
        bias, x = torch.zeros(40), random_matrix(3, 64)
        assert_is_the_product(weight.multiply(x, weight.padded_bias(bias)), weight, x, bias)


def test_scales_of_q4_0_beyond_float16_are_refused():
    blocks = np.zeros((1, 1, 18), np.uint8)
    blocks[..., :2] = np.array([9000], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="8,188"):
        Int4Weight.from_blocks(blocks)


@pytest.mark.parametrize("kind", FORMATS)
def test_embedding_rows_are_the_matrix_rows_and_bad_ids_are_told(kind):
    weight = kind.from_float(random_matrix(70, 50))
    ids = torch.tensor([[3, 69], [0, 3]])
    assert torch.equal(weight.gather(ids), weight.unpacked()[ids])
    for bad in (-1, 70):
        with pytest.raises(IndexError):
            weight.gather(torch.tensor([bad]))


def product_with(dot, format_, few, many):
    """One tile times some rows in the instructions of one kind, compiled for the test."""

    @njit
    def multiply(rows, x, fields, stride, tile, groups, bias, out, channels):
        multiply_quantised_tile(
            format_, dot, few, many, rows, x, fields, stride, tile, tile, 0, groups, bias, out, channels, channels
        )

    return multiply


@pytest.mark.skipif(len(usable_dot_products()) < 2, reason="this processor has no special instruction")
@pytest.mark.parametrize("kind, format_", [(Int8Weight, INT8), (Int4Weight, INT4), (Int8ChannelWeight, INT8_CHANNELS)])
def test_every_instruction_set_gives_the_same_bits(kind, format_):
    """Extreme numbers among them, where sums of 16 bits would saturate; a few rows, and as many as each takes at once."""
    inputs, rows, channels = 128, 12, 27
    matrix = random_matrix(channels, inputs)
    matrix[:8] = matrix[:8].sign() * 3
    weight = kind.from_float(matrix)
    x = random_matrix(rows, inputs, seed=5)
    x[1:3] = matrix[:2]
    groups, joined = num_groups(inputs), groups_together(format_) > 1
    numbers = torch.zeros(rows_bytes(rows, groups), dtype=torch.uint8)
    quantise_rows(1, rows, x.data_ptr(), groups, joined, numbers.data_ptr())
    bias = torch.zeros(32)
    wanted = weight.multiply(x, bias)
    for dot in usable_dot_products():
        out, most = torch.full((rows + 1, channels), float("nan")), DOT_PRODUCTS[dot].sums
        multiply = product_with(dot, format_, 2, most)
        fields = numbers.data_ptr() + rows * groups * 32
        for count in (1, 2, most):
            multiply(
                count,
                numbers.data_ptr(),
                fields,
                rows,
                weight.tiles.data_ptr(),
                groups,
                bias.data_ptr(),
                out.data_ptr(),
                channels,
            )
            assert torch.equal(out[:count], wanted[:count])
            assert out[count:].isnan().all()
            out[:] = float("nan")


@pytest.mark.parametrize("kind, bytes_", [(Int8Weight, 5 * 34), (Int4Weight, 5 * 20), (Int8ChannelWeight, 6 * 32 + 4)])
def test_a_tile_is_its_channels_and_nothing_else(kind, bytes_):
    assert kind(33, 160).tiles.shape == (2, 32 * bytes_)


def test_a_channel_keeps_its_largest_number_and_no_other_touches_it():
    matrix = random_matrix(40, 192)
    matrix[3] *= 1000
    matrix[4] = 0
    matrix[5] *= 1e-40
    unpacked = Int8ChannelWeight.from_float(matrix).unpacked()
    assert not unpacked[4:6].any()
    top = matrix.abs().amax(1)
    assert torch.allclose(unpacked.abs().amax(1), top, rtol=1e-6, atol=1e-30)
    assert ((unpacked - matrix).abs() <= (top / 253)[:, None] + 1e-30).all()


LESSER = {
    "Avx2": ("znver3", "+avx,+avx2,+fma,+f16c,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+bmi,+bmi2,+popcnt"),
    "Portable": ("generic", ""),
}
LESSER_ARM = {"ArmDotProduct": ("generic", "+neon,+dotprod"), "Portable": ("generic", "+neon")}


@pytest.mark.skipif(len(usable_dot_products()) < 3, reason="the processor is no better than those that are tried")
@pytest.mark.parametrize("name", sorted(LESSER if is_x86() else LESSER_ARM))
def test_a_lesser_processor_passes_the_same_tests(name, tmp_path):
    """numba is told to leave instructions out, so the very kernels that such a machine would run are run."""
    environment = environment_of(name, tmp_path)
    assert_passes(__file__, "product_is_that or same_bits_in_every_batch or keep_their_very", environment)
    probe = "from helix_gateway.runtime.cpu.dot_products import *; print(type(DOT_PRODUCTS[HOST_DOT]).__name__)"
    told = subprocess.run([sys.executable, "-c", probe], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert told.stdout.strip() == name


@pytest.mark.deep
@pytest.mark.skipif(len(usable_dot_products()) < 3, reason="the processor is no better than those that are tried")
@pytest.mark.parametrize("name", sorted(LESSER if is_x86() else LESSER_ARM))
def test_the_step_of_a_whole_model_passes_its_test_on_a_lesser_processor(name, tmp_path):
    """One with four bits over int8 pages, as they are served: rows, chunks and order change no bit there either."""
    step = str(Path(__file__).with_name("test_quantised_step.py"))
    assert_passes(step, "batch_chunk_and_order and llama-int4", environment_of(name, tmp_path))


ROOT = Path(__file__).parents[2]


def environment_of(name, folder):
    """Variables under which numba compiles for a lesser processor, into a folder."""
    cpu, features = (LESSER if is_x86() else LESSER_ARM)[name]
    told = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(folder)}
    return {**os.environ, **told}


def assert_passes(file, chosen, environment):
    """The chosen tests of a file pass in a process of their own; there is one at least."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", chosen]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]


@njit
def _gated(numbers, gate_and_up, groups, joined, into, to):
    gate_row(into, gate_and_up, groups * 32, into)
    quantise_row(numbers, to, 1, 3, groups, joined)


@njit
def _gated_at_once(gate_and_up, groups, joined, to):
    quantise_gated_row(gate_and_up, to, 1, 3, groups, joined)


@pytest.mark.parametrize("joined", [False, True])
def test_a_gated_row_is_rounded_as_if_it_had_been_written_down_first(joined):
    groups = 48
    both = random_matrix(2, 32 * groups, seed=5) * torch.tensor([[6.0], [2.0]])
    both[0, :8] = torch.tensor([0.0, -0.0, 90.0, -90.0, -87.4, 200.0, -200.0, 1e-30])
    places = torch.zeros(2, rows_bytes(3, groups), dtype=torch.uint8)
    wide = np.zeros(32 * groups, np.float32)
    _gated(wide.ctypes.data, both.data_ptr(), groups, joined, wide, places[0].data_ptr())
    _gated_at_once(both.data_ptr(), groups, joined, places[1].data_ptr())
    assert torch.equal(places[0], places[1])
    assert places[0].any()
    exact = torch.nn.functional.silu(both[0].double()) * both[1].double()
    assert np.allclose(wide, exact, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("joined", [False, True])
def test_a_row_is_written_to_its_place_and_nowhere_else(joined):
    """Its numbers, scales and sums, by the definition; what lies there of its neighbours stays."""
    groups, rows, row, size = 6, 3, 1, 64 if joined else 32
    x = random_matrix(1, 32 * groups, seed=6)
    room = torch.full((rows_bytes(rows, groups),), 77, dtype=torch.uint8)
    _quantise(x.data_ptr(), room.data_ptr(), row, rows, groups, joined)
    split = rows * groups * 32
    steps = room[:split].view(torch.int8).view(-1, rows, size)
    fields = room[split:].view(3, groups, rows, 4)
    scales, starts, worths = (fields[i, :: size // 32, row].contiguous() for i in range(3))
    scale = scales.view(torch.float32)[:, 0]
    assert torch.equal((steps[:, row] * scale[:, None]).double().view(1, -1), rounded(x, size).float().double())
    total = steps[:, row].int().sum(1)
    assert torch.equal(starts.view(torch.int32)[:, 0], -128 * total)
    assert torch.equal(worths.view(torch.float32)[:, 0], scale * total)
    steps[:, row], fields[:, :, row] = 77, 77
    assert (room == 77).all()


@njit
def _quantise(numbers, to, row, rows, groups, joined):
    quantise_row(numbers, to, row, rows, groups, joined)


def test_four_bits_lose_less_than_rounding_between_the_extremes_of_a_group():
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(3))
    groups = weight.view(-1, 32)
    least, most = groups.aminmax(dim=1, keepdim=True)
    step = (most - least) / 15
    plain = (((groups - least) / step).round() * step + least - groups).square().mean()
    assert (Int4Weight.from_float(weight).unpacked() - weight).square().mean() < 0.85 * plain


def test_what_lies_on_a_grid_of_sixteen_steps_keeps_its_numbers():
    dice = torch.Generator().manual_seed(4)
    steps = torch.randint(0, 16, (64, 5, 32), generator=dice).float()
    steps[..., 0], steps[..., 1] = 0, 15
    scales, minima = (torch.rand(64, 5, 1, generator=dice).half().float() for _ in range(2))
    weight = (steps * scales - minima).view(64, 160)
    assert torch.equal(Int4Weight.from_float(weight).unpacked(), weight)


@pytest.mark.parametrize("number", [0.0, 0.75, -3.0])
def test_a_group_of_one_number_stays_that_number(number):
    weight = torch.full((32, 64), number)
    assert torch.equal(Int4Weight.from_float(weight).unpacked(), weight)
