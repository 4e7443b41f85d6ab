"""Queries and keys turned in place: every number is two products and their sum, however many are computed together."""

import numpy as np
import pytest
import torch

from helix_gateway.runtime.cpu.rotating import rotate_rows

HEADS, ROWS, BEHIND = 3, 5, 7
POSITIONS = np.array([4, 0, 9, 9, 2], np.int32)


def turned(rows, dim, cosines, sines):
    """As transformers does it, one number at a time."""
    half, out = cosines.shape[1] // 2, rows.copy()
    for row, position in enumerate(POSITIONS):
        for head in range(HEADS):
            for i in range(half):
                low, high = head * dim + i, head * dim + half + i
                a, b = rows[row, low], rows[row, high]
                out[row, low] = a * cosines[position, i] - b * sines[position, i]
                out[row, high] = b * cosines[position, half + i] + a * sines[position, half + i]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim, rotated", [(64, 64), (128, 128), (80, 80), (16, 16), (64, 32), (96, 72), (10, 6)])
def test_rows_are_turned_to_the_bit(dim, rotated, dtype):
    dice = np.random.default_rng(dim + rotated)
    channels = HEADS * dim + BEHIND
    rows = torch.from_numpy(dice.standard_normal((ROWS, channels), np.float32)).to(dtype)
    # The halves of these tables differ, as no model's do: who mixes them up is found out.
    cosines, sines = (dice.standard_normal((10, rotated), np.float32) for _ in range(2))
    wanted = torch.from_numpy(turned(rows.float().numpy(), dim, cosines, sines)).to(dtype)

    kind = np.empty(0, np.float32 if dtype == torch.float32 else np.uint16)
    before = rows[[0, 3, 4]].clone()
    rotate_rows(kind, 1, 3, rows.data_ptr(), channels, HEADS, dim, POSITIONS, cosines, sines)

    assert torch.equal(rows[1:3], wanted[1:3])
    assert torch.equal(rows[[0, 3, 4]], before)
