"""The cache under every order of events: nothing is lost, nothing is written that two sequences read."""

import contextlib
import copy
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from compat_tests.effort import deeply
from compat_tests.engine.toy import ONE_GROUP, TWO_GROUPS
from helix_gateway.core.kv import KVGroup
from helix_gateway.engine.audit import BrokenInvariantError
from helix_gateway.engine.block_pool import NoFreeBlocksError
from helix_gateway.engine.kv_cache import PagedKVCache


class Known:
    """What the test itself knows of a sequence."""

    def __init__(self, token_ids, computed, salt):
        self.token_ids = token_ids
        self.computed = computed
        self.salt = salt


class NothingThere(Exception):
    """There is nothing that could be wrong in this way."""


class Dice(random.Random):
    def one_of(self, things):
        if not things:
            raise NothingThere
        return self.choice(list(things))


def assert_found(corrupt, cache, tokens, dice):
    """In a copy of the cache something is put wrong, and `check` says what."""
    spoilt, tokens, writes = copy.deepcopy(cache), dict(tokens), []
    said = corrupt(spoilt, tokens, writes, dice)
    with pytest.raises(BrokenInvariantError, match=said):
        spoilt.check(tokens, writes)


# What could go wrong, done to (cache, tokens of the living, writes to come); each answers what `check` must say then.


def tables_of(cache):
    return [(name, table) for name, tables in cache._tables.items() for table in tables]


def held(cache):
    return [block for _, table in tables_of(cache) for block in table.blocks]


def a_reference_too_many(cache, tokens, writes, dice):
    cache.pool._ref_counts[dice.one_of(held(cache))] += 1
    return "count is not that of the tables"


def a_reference_that_nobody_gave_back(cache, tokens, writes, dice):
    del cache._tables[dice.one_of([name for name, table in tables_of(cache) if table.blocks])]
    return "count is not that of the tables"


def a_block_that_is_lost(cache, tokens, writes, dice):
    del cache.pool._free[dice.one_of(cache.pool._free)]
    return "not all blocks"


def a_block_that_is_given_away_while_it_is_held(cache, tokens, writes, dice):
    cache.pool._free[dice.one_of(held(cache))] = None
    return "not all blocks"


def a_block_that_is_free_and_cached(cache, tokens, writes, dice):
    cache.pool._cached[dice.one_of(cache.pool._free)] = None
    return "both free and cached"


def a_cached_block_that_cannot_be_found(cache, tokens, writes, dice):
    cache._index.forget(dice.one_of(cache.pool._cached))
    return "a cached block cannot be found"


def a_free_block_that_can_be_found(cache, tokens, writes, dice):
    cache._index.publish(dice.one_of(cache.pool._free), b"nobody's")
    return "a free block can be found"


def an_index_of_two_minds(cache, tokens, writes, dice):
    cache._index._keys[dice.one_of(cache._index._keys)] = b"another"
    return "prefix index finds a block under a key"


def a_block_twice_in_a_table(cache, tokens, writes, dice):
    _, table = dice.one_of([found for found in tables_of(cache) if found[1].blocks])
    table.blocks.append(table.blocks[0])
    return "a table holds a block twice"


def a_sequence_that_has_ended(cache, tokens, writes, dice):
    name, _ = dice.one_of(tables_of(cache))
    del tokens[name]
    return f"{name}, which has ended"


def a_key_of_other_tokens(cache, tokens, writes, dice):
    _, table = dice.one_of([found for found in tables_of(cache) if found[1].keys])
    table.keys[dice.randrange(len(table.keys))] = b"another"
    return "not those of its tokens"


def a_token_changed_after_its_key(cache, tokens, writes, dice):
    name, table = dice.one_of([found for found in tables_of(cache) if found[1].keys])
    changed = dice.randrange(len(table.keys) * table.group.tokens_per_block)
    tokens[name] = [token + (i == changed) for i, token in enumerate(tokens[name])]
    return "not those of its tokens"


def a_block_found_under_another_contents_key(cache, tokens, writes, dice):
    full = [b for name, table in tables_of(cache) for b in table.blocks[: len(table.keys) - table.num_released]]
    block = dice.one_of([block for block in full if cache._index.holds(block)])
    cache._index.forget(block)
    cache._index.publish(block, b"another")
    return "under another content's key"


def a_write_to_what_others_read(cache, tokens, writes, dice):
    shared = {block for block in held(cache) if cache._index.holds(block) or cache.pool.ref_count(block) > 1}
    name, table, block = dice.one_of(
        [(name, table, b) for name, table in tables_of(cache) for b in table.blocks if b in shared]
    )
    start = (table.blocks.index(block) + table.num_released) * table.group.tokens_per_block
    writes.append((name, start, start + 1))
    return "others read or may find"


def a_write_past_the_last_block(cache, tokens, writes, dice):
    name, table = dice.one_of(tables_of(cache))
    start = table.num_entries * table.group.tokens_per_block
    writes.append((name, start, start + 1))
    return "has no block"


CORRUPTIONS = [
    a_reference_too_many,
    a_reference_that_nobody_gave_back,
    a_block_that_is_lost,
    a_block_that_is_given_away_while_it_is_held,
    a_block_that_is_free_and_cached,
    a_cached_block_that_cannot_be_found,
    a_free_block_that_can_be_found,
    an_index_of_two_minds,
    a_block_twice_in_a_table,
    a_sequence_that_has_ended,
    a_key_of_other_tokens,
    a_token_changed_after_its_key,
    a_block_found_under_another_contents_key,
    a_write_to_what_others_read,
    a_write_past_the_last_block,
]


def a_busy_cache():
    """Two sequences that share a prefix, a fork with a block of its own, and a prefix that nobody holds any more."""
    cache = PagedKVCache(ONE_GROUP, 20)
    tokens = {"one": [1, 2, 3, 4, 5, 6, 7, 8, 9], "two": [1, 2, 3, 4, 9, 9, 9, 9, 9], "gone": [7] * 9}
    for name, known in tokens.items():
        computed = cache.add(name, known)
        cache.reserve(name, computed, 9)
        cache.commit(name, known, 9)
    cache.fork("one", "fork", 8)
    cache.remove("gone")
    return cache, {"one": tokens["one"], "two": tokens["two"], "fork": tokens["one"]}


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_what_is_put_wrong_on_purpose_is_found(corrupt):
    cache, tokens = a_busy_cache()
    cache.check(tokens)
    for seed in range(20):
        assert_found(corrupt, cache, tokens, Dice(seed))


def test_a_fork_that_goes_another_way_within_a_block_that_its_parent_filled_is_no_fault():
    cache = PagedKVCache(ONE_GROUP, 20)
    size = ONE_GROUP[0].tokens_per_block
    parent, child = [1] * size, [1, *[2] * size]
    cache.add("parent", parent)
    cache.reserve("parent", 0, size)
    cache.commit("parent", parent, size)
    cache.fork("parent", "child", 1)
    cache.check({"parent": parent, "child": child})
    ((source, own),) = cache.reserve("child", 1, len(child))
    assert source != own
    cache.commit("child", child, len(child))
    cache.check({"parent": parent, "child": child})


def test_what_is_written_anew_loses_its_keys_though_nobody_shares_it():
    """Of two who computed the same, the second's blocks cannot be found, but have keys; then it computes something else."""
    cache = PagedKVCache(ONE_GROUP, 20)
    size = ONE_GROUP[0].tokens_per_block
    before, tokens = [1] * (2 * size + 1), {"first": [1] * (2 * size + 1)}
    for name in ("first", "second"):
        cache.add(name, before)
    for name in ("first", "second"):
        cache.reserve(name, 0, 2 * size)
        cache.commit(name, before, 2 * size)
    tokens["second"] = [1] * (size + 1) + [2] * size
    assert cache.reserve("second", size + 1, 2 * size) == []
    cache.commit("second", tokens["second"], 2 * size)
    cache.check(tokens)


class CacheMachine(RuleBasedStateMachine):
    """Random admit, append, fork, roll back, cancel and eviction, against a plain model of the pages' contents."""

    @initialize(
        groups=st.sampled_from(
            [ONE_GROUP, TWO_GROUPS, (KVGroup("a", 2, 3), KVGroup("b", 3, None), KVGroup("c", 1, 9))]
        ),
        num_blocks=st.integers(6, 40),
        caching=st.booleans(),
    )
    def start(self, groups, num_blocks, caching):
        self.cache = PagedKVCache(groups, num_blocks, enable_prefix_caching=caching)
        self.pages = {}
        self.known = {}
        self.names = 0

    def sequence(self, draw_from):
        names = sorted(self.known)
        return names[draw_from % len(names)]

    def new_name(self):
        self.names += 1
        return self.names

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30), salt=st.sampled_from(["", "x"]))
    def admit(self, tokens, salt):
        name = self.new_name()
        computed = self.cache.add(name, tokens, cache_salt=salt)
        assert 0 <= computed < len(tokens)
        self.known[name] = Known(list(tokens), computed, salt)
        self.assert_readable(name)

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 99), new=st.lists(st.integers(0, 1), max_size=5), rejected=st.integers(0, 6))
    def compute(self, which, new, rejected):
        """One step: what is pending and some draft tokens are written, the drafts are rejected again."""
        name = self.sequence(which)
        known = self.known[name]
        known.token_ids += new
        end = len(known.token_ids) + rejected
        before = self.cache.pool.num_available
        try:
            copies = self.cache.reserve(name, known.computed, end)
        except NoFreeBlocksError:
            assert self.cache.pool.num_available == before
            return
        self.cache.check(self.tokens(), [(name, known.computed, end)])
        for source, destination in copies:
            self.pages[destination] = dict(self.pages.get(source, {}))
        for position in range(known.computed, end):
            self.write(name, position)
        known.computed = len(known.token_ids)
        self.assert_readable(name)
        self.cache.commit(name, known.token_ids, known.computed)
        self.assert_readable(name)

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 99))
    def fork(self, which):
        name = self.sequence(which)
        known = self.known[name]
        if known.computed and all(table.num_released == 0 for table in self.cache.tables(name)):
            child = self.new_name()
            shared = max(0, known.computed - 1)
            self.cache.fork(name, child, shared)
            self.known[child] = Known(known.token_ids[: shared + 1], shared, known.salt)
            self.assert_readable(child)

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 99))
    def cancel(self, which):
        name = self.sequence(which)
        del self.known[name]
        self.cache.remove(name)
        self.cache.remove(name)

    def tokens(self):
        return {name: known.token_ids for name, known in self.known.items()}

    @rule(corrupt=st.sampled_from(CORRUPTIONS), seed=st.integers(0, 2**32))
    def corrupt(self, corrupt, seed):
        """In a copy of the cache something is wrong, and `check` says what."""
        with contextlib.suppress(NothingThere):
            assert_found(corrupt, self.cache, self.tokens(), Dice(seed))

    def place(self, name, group, position):
        table = self.cache.tables(name)[group]
        entry, offset = divmod(position, table.group.tokens_per_block)
        return table.blocks[entry - table.num_released], offset

    def write(self, name, position):
        known = self.known[name]
        token = known.token_ids[position] if position < len(known.token_ids) else "draft"
        for group in range(len(self.cache.groups)):
            block, offset = self.place(name, group, position)
            holders = [t for other in self.known for t in self.cache.tables(other) if block in t.blocks]
            assert len(holders) == 1, "a block is written that two sequences read"
            self.pages.setdefault(block, {})[offset] = (known.salt, tuple(known.token_ids[:position]), token)

    def assert_readable(self, name):
        """Every position that the next token reads holds what this very sequence would have written there."""
        known = self.known[name]
        for group, shape in enumerate(self.cache.groups):
            first = 0 if shape.window is None else max(0, known.computed - shape.window + 1)
            for position in range(first, known.computed):
                block, offset = self.place(name, group, position)
                wanted = (known.salt, tuple(known.token_ids[:position]), known.token_ids[position])
                assert self.pages[block][offset] == wanted

    @invariant()
    def accounts_agree(self):
        if hasattr(self, "cache"):
            self.cache.check(self.tokens())
            for name in self.known:
                self.assert_readable(name)
                for table in self.cache.tables(name):
                    assert table.row().tolist() == [0] * table.num_released + table.blocks

    def teardown(self):
        if hasattr(self, "cache"):
            for name in list(self.known):
                self.cache.remove(name)
            self.cache.check({})
            assert self.cache.pool.num_referenced == 0


CacheMachine.TestCase.settings = settings(
    max_examples=deeply(80, 2000), stateful_step_count=deeply(40, 200), deadline=None
)
TestCacheUnderEveryOrderOfEvents = CacheMachine.TestCase
