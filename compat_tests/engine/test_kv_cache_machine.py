"""The cache under every order of events: nothing is lost, nothing is written that two sequences read."""

import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from compat_tests.engine.toy import ONE_GROUP, TWO_GROUPS
from helix_gateway.core.kv import KVGroup
from helix_gateway.engine.block_pool import NoFreeBlocksError
from helix_gateway.engine.kv_cache import PagedKVCache

DEEP = bool(os.environ.get("HELIX_TEST_DEEP"))


class Known:
    """What the test itself knows of a sequence."""

    def __init__(self, token_ids, computed, salt):
        self.token_ids = token_ids
        self.computed = computed
        self.salt = salt


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
            self.cache.check()
            for name in self.known:
                self.assert_readable(name)

    def teardown(self):
        if hasattr(self, "cache"):
            for name in list(self.known):
                self.cache.remove(name)
            self.cache.check()
            assert self.cache.pool.num_referenced == 0


CacheMachine.TestCase.settings = settings(max_examples=1000 if DEEP else 80, stateful_step_count=40, deadline=None)
TestCacheUnderEveryOrderOfEvents = CacheMachine.TestCase
