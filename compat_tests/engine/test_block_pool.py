"""Which blocks the pool hands out: runs of neighbours where it can, and of what is cached the oldest."""

from helix_gateway.engine.block_pool import BlockPool
from helix_gateway.engine.prefix_index import PrefixIndex


def test_a_prompt_in_a_fresh_pool_lies_in_one_run():
    pool = BlockPool(40, PrefixIndex())
    pool.allocate(1)
    other = pool.allocate(1)
    assert pool.allocate(30, after=other[-1]) == list(range(other[-1] + 1, other[-1] + 31))


def test_a_table_grows_into_the_blocks_behind_its_last_once_they_are_free():
    pool = BlockPool(40, PrefixIndex())
    blocks = pool.allocate(9)
    # Last first, as tables are given up; older free blocks are passed over.
    pool.release(blocks[5:3:-1])
    assert pool.allocate(2, after=blocks[3]) == blocks[4:6]


def test_two_tables_that_grow_in_turn_lie_in_two_runs_where_each_has_room_behind_it():
    pool = BlockPool(80, PrefixIndex())
    low, gap, high = pool.allocate(1), pool.allocate(39), pool.allocate(1)
    pool.release(gap)
    for _ in range(20):
        low += pool.allocate(1, after=low[-1])
        high += pool.allocate(1, after=high[-1])
    assert low == list(range(low[0], low[0] + 21))
    assert high == list(range(high[0], high[0] + 21))


def test_of_cached_blocks_those_released_longest_ago_go_and_the_others_stay():
    index = PrefixIndex()
    pool = BlockPool(12, index)
    for block in pool.allocate(12):
        index.publish(block, bytes([block]))
    pool.release(range(11, -1, -1))
    assert sorted(pool.allocate(4)) == [8, 9, 10, 11]
    assert [index.holds(block) for block in range(12)] == [True] * 8 + [False] * 4
