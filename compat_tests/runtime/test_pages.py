"""Pages of one arena serve every KV group: units never overlap, and no group is left without room."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.runtime.groups import LayerShape, group_layers
from helix_gateway.runtime.kv_format import token_elements
from helix_gateway.runtime.pages import Arena, lay_out_pages, pages_in

CPU = torch.device("cpu")
DIMS = st.sampled_from([1, 3, 8, 16, 20])
SHAPES = st.builds(LayerShape, st.integers(1, 4), DIMS, DIMS, st.sampled_from([None, 4, 7]))
LAYERS = st.lists(st.sampled_from(range(3)), min_size=1, max_size=9)


def arenas(layout, num_pages):
    yield Arena.slice_major(layout, num_pages, CPU)
    yield Arena.page_major(layout, num_pages, CPU)


DTYPES = st.sampled_from([torch.float32, torch.int8])


@given(st.lists(SHAPES, min_size=3, max_size=3), LAYERS, st.integers(1, 33), DTYPES)
def test_units_of_a_group_share_no_element_and_stay_in_their_page(shapes, layers, block_size, dtype):
    layout = lay_out_pages(group_layers("m", [shapes[kind] for kind in layers]), block_size, dtype)
    num_pages = 3
    for arena in arenas(layout, num_pages):
        for group in layout.groups:
            assert group.tokens_per_block >= 1
            owner = np.full(arena.memory.numel(), -1)
            for page in range(num_pages):
                for offset in arena.unit_offsets(group).ravel():
                    start = offset + page * arena.page_stride
                    unit = owner[start : start + group.unit_elements]
                    assert len(unit) == group.unit_elements
                    assert (unit == -1).all()
                    unit[:] = page
            # Copying a page moves its units in every group, so that a page may pass from one to another.
            arena.memory[:] = torch.from_numpy(owner).to(dtype)
            arena.copy_pages([(0, 1)])
            assert set(arena.memory[owner == 1].tolist()) == {0.0}
            assert set(arena.memory[owner == 2].tolist()) == {2.0}


@given(st.lists(SHAPES, min_size=3, max_size=3), LAYERS, st.integers(1, 33), DTYPES)
def test_a_page_holds_a_block_of_the_largest_group(shapes, layers, block_size, dtype):
    def elements(group):
        return len(group.layers) * token_elements(group.shape, dtype)

    groups = group_layers("m", [shapes[kind] for kind in layers])
    layout = lay_out_pages(groups, block_size, dtype)
    held = {layout.group: layout.tokens_per_block for layout in layout.groups}
    assert held[max(groups, key=elements)] >= block_size
    for group in layout.groups:
        assert group.tokens_per_block * elements(group.group) <= layout.page_elements
        assert dtype != torch.int8 or group.unit_tokens % 4 == 0


def test_int8_holds_nearly_four_times_the_tokens_in_the_same_memory():
    smollm2 = group_layers("m", [LayerShape(3, 64, 64, None)] * 30)
    pages = {dtype: pages_in(lay_out_pages(smollm2, 16, dtype), 1 << 30, None) for dtype in (torch.float32, torch.int8)}
    assert lay_out_pages(smollm2, 16, torch.int8).page_bytes == 16 * 30 * 3 * (64 + 64 + 8)
    assert pages[torch.int8] / pages[torch.float32] > 3.75


def test_one_group_leaves_nothing_of_a_page_unused():
    layout = lay_out_pages(group_layers("m", [LayerShape(3, 64, 64, None)] * 30), 16)
    (group,) = layout.groups
    assert (group.tokens_per_block, group.runs, layout.slices) == (16, 1, 30)
    assert layout.page_elements == 16 * 30 * 3 * 128


def test_a_shallow_group_puts_more_tokens_into_a_page():
    windowed, full = LayerShape(2, 64, 64, 512), LayerShape(2, 64, 64, None)
    layout = lay_out_pages(group_layers("m", [windowed] * 5 + [full] + [windowed] * 5 + [full]), 16)
    assert [group.tokens_per_block for group in layout.groups] == [16, 80]


def test_layers_of_one_shape_are_one_group_wherever_they_stand():
    a, b = LayerShape(2, 64, 64, 9), LayerShape(2, 64, 64, None)
    assert [group.layers for group in group_layers("m", [a, b, a, a, b])] == [(0, 2, 3), (1, 4)]


@pytest.mark.parametrize("number", [0, 1])
def test_copies_are_made_one_after_another_and_touch_no_other_page(number):
    layout = lay_out_pages(group_layers("m", [LayerShape(1, 2, 2, None)] * 3), 2)
    arena = list(arenas(layout, 4))[number]
    view = arena.memory.view(-1, 4, arena.page_stride)
    for page in range(4):
        view[:, page] = page
    arena.copy_pages([(1, 2), (2, 3)])
    assert [view[:, page].unique().tolist() for page in range(4)] == [[0], [1], [1], [1]]


def test_memory_that_holds_no_page_is_said_to_be_too_little():
    groups = group_layers("m", [LayerShape(1, 2, 2, None)])
    layout = lay_out_pages(groups, 4)
    assert pages_in(layout, 64, None) == 1
    assert pages_in(lay_out_pages(groups, 4, torch.bfloat16), 64, None) == 2
    with pytest.raises(
        OutOfMemoryError, match=r"6.01e-05 MiB were given, but one block of \d+ tokens takes 6.1e-05 MiB"
    ):
        pages_in(layout, 63, None)
    with pytest.raises(ValueError, match="number of pages"):
        pages_in(layout, None, None)


def test_a_layout_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        lay_out_pages((), 16)
    with pytest.raises(ValueError, match="positive block size, not 0"):
        lay_out_pages(group_layers("m", [LayerShape(1, 2, 2, None)]), 0)
