"""Which blocks the pool hands out: runs of neighbours where it can, and of what is cached the oldest."""

import random
from itertools import pairwise

from compat_tests.engine.toy import ONE_GROUP
from helix_gateway.engine.block_pool import BlockPool
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.prefix_index import PrefixIndex


def full_pool(num_blocks, *, held=()):
    """All cached, as a table of the whole pool leaves it, but for those that are still held."""
    index = PrefixIndex()
    pool = BlockPool(num_blocks, index)
    pool.allocate(num_blocks)
    for block in range(num_blocks):
        index.publish(block, block.to_bytes(4, "big"))
    pool.release(block for block in reversed(range(num_blocks)) if block not in held)
    return pool, index


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


def test_whoever_begins_has_room_to_grow_into_that_nobody_else_begins_in():
    pool, _ = full_pool(320)
    tables = [pool.allocate(1) for _ in range(3)]
    for _ in range(4):
        for table in tables:
            table += pool.allocate(1, after=table[-1])
    assert all(later == block + 1 for table in tables for block, later in pairwise(table))


def test_the_longest_run_goes_first():
    pool = BlockPool(160, PrefixIndex())
    pool.allocate(160)
    pool.release([90, 2, 7, 6, 5, 4, 80])
    assert pool.allocate(4) == [4, 5, 6, 7]


def test_of_cached_blocks_those_released_longest_ago_go_and_the_others_stay():
    pool, index = full_pool(12)
    assert sorted(pool.allocate(4)) == [8, 9, 10, 11]
    assert [index.holds(block) for block in range(12)] == [True] * 8 + [False] * 4


def test_the_last_blocks_of_a_cached_chain_are_handed_out_so_that_its_beginning_can_still_be_found():
    pool, index = full_pool(160)
    assert pool.allocate(6) == list(range(150, 156))
    assert [block for block in range(160) if index.holds(block)] == list(range(150))


def test_where_there_is_no_run_at_most_a_sixteenth_is_freed_for_one():
    pool, _ = full_pool(160, held=range(0, 160, 2))
    taken = [block for _ in range(40) for block in pool.allocate(1)]
    assert pool.num_cached == 160 - 80 - 40 - 9
    assert not [*pool.faults([*range(0, 160, 2), *taken])]


def test_after_many_requests_most_pages_still_follow_their_predecessor():
    """Four at a time, of random lengths, in a pool that has long been full of what is cached."""
    dice, size = random.Random(0), ONE_GROUP[0].tokens_per_block
    cache, living, follow, pairs = PagedKVCache(ONE_GROUP, 1000), {}, 0, 0
    for request in range(200):
        prompt, length = dice.randint(size, 60 * size), dice.randint(61, 80) * size
        tokens = [dice.randrange(50_000) for _ in range(length)]
        cache.add(request, tokens[:prompt])
        cache.reserve(request, 0, prompt)
        living[request] = (tokens, prompt)
        while len(living) == 4:
            for name, (tokens, computed) in [*living.items()]:
                grown = min(len(tokens), computed + size)
                cache.reserve(name, computed, grown)
                cache.commit(name, tokens, grown)
                living[name] = (tokens, grown)
                if grown == len(tokens):
                    (table,) = cache.tables(name)
                    follow += sum(later == block + 1 for block, later in pairwise(table.blocks))
                    pairs += len(table.blocks) - 1
                    cache.remove(name)
                    del living[name]
    assert follow > 0.6 * pairs


def test_the_next_turns_of_chats_are_found_whole_while_the_pool_holds_them_with_a_sixteenth_to_spare():
    dice, size = random.Random(1), ONE_GROUP[0].tokens_per_block
    cache = PagedKVCache(ONE_GROUP, 640)
    chats = [[] for _ in range(10)]
    for turn in range(100):
        chat = chats[turn % 10]
        chat += [dice.randrange(50_000) for _ in range(5 * size)]
        found = cache.add(turn, chat)
        assert found == len(chat) - 5 * size
        cache.reserve(turn, found, len(chat))
        cache.commit(turn, chat, len(chat))
        cache.remove(turn)
        cache.check()
