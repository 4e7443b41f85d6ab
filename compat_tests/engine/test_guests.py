"""A drafter's tables: they go when their sequence goes or when memory is short, and cost nobody else anything."""

import pytest

from compat_tests.engine.toy import Answers, ToyRunner, drain, make_engine, request
from helix_gateway.core.kv import KVGroup
from helix_gateway.engine.audit import BrokenInvariantError
from helix_gateway.engine.block_pool import NoFreeBlocksError
from helix_gateway.engine.kv_cache import PagedKVCache

TARGET, DRAFT = (KVGroup("model0/full", 4, None),), (KVGroup("model1/full", 6, None),)


def cache_with_guests(num_blocks=20, hosts=("a", "b"), num_tokens=12):
    cache, tokens = PagedKVCache((*TARGET, *DRAFT), num_blocks), {}
    for place, host in enumerate(hosts):
        tokens[host] = [place] * num_tokens
        for name, groups, guest_of in ((host, TARGET, None), (("draft", host), DRAFT, host)):
            cache.add(name, tokens[host], groups=groups, host=guest_of)
            cache.reserve(name, 0, num_tokens)
            cache.commit(name, tokens[host], num_tokens)
    return cache, tokens


def test_a_guest_goes_with_its_host_and_leaves_nothing_behind():
    cache, tokens = cache_with_guests()
    cache.check(tokens)
    cache.remove("a")
    assert ("draft", "a") not in cache
    assert ("draft", "b") in cache
    del tokens["a"]
    cache.check(tokens)
    cache.remove("b")
    cache.check({})
    assert cache.pool.num_referenced == 0


def test_a_guest_is_taken_back_last_come_first_and_its_prefix_stays_to_be_found():
    cache, tokens = cache_with_guests()
    available, could_be = cache.pool.num_available, cache.num_available
    assert could_be == available + 4
    assert cache.evict_guest()
    assert ("draft", "b") not in cache
    assert (cache.pool.num_available, cache.num_available) == (available + 2, could_be)
    assert cache.add(("draft", "b"), [*tokens["b"], 9], groups=DRAFT, host="b") == 12
    assert cache.evict_guest()
    assert cache.evict_guest()
    assert not cache.evict_guest()
    cache.check(tokens)


def test_a_guest_takes_no_block_that_anybody_holds():
    cache, _ = cache_with_guests(num_blocks=10)
    with pytest.raises(NoFreeBlocksError):
        cache.reserve(("draft", "a"), 12, 40)
    assert {"a", "b", ("draft", "a"), ("draft", "b")} <= cache._tables.keys()


def test_a_guest_of_nobody_and_a_key_of_other_tokens_are_found():
    cache, tokens = cache_with_guests()
    del cache._tables["a"]
    with pytest.raises(BrokenInvariantError, match="guest of a, which has ended"):
        cache.check()
    cache, tokens = cache_with_guests()
    cache.tables(("draft", "a"))[0].keys[0] = b"?"
    with pytest.raises(BrokenInvariantError, match="not those of its tokens"):
        cache.check(tokens)


def test_an_emptied_cache_has_no_guests():
    cache, _ = cache_with_guests()
    cache.reset()
    assert not cache.evict_guest()
    assert cache.num_available == 20


def test_two_engines_over_one_cache_each_check_their_own():
    cache = PagedKVCache((*TARGET, *DRAFT), 40)
    engines = [make_engine(runner=ToyRunner(groups, 40), cache=cache) for groups in (TARGET, DRAFT)]
    for name, engine in zip("ab", engines, strict=True):
        engine.submit(request(name, [5, 6, 7, 8, 9], max_tokens=12, ignore_eos=True))
    for _ in range(4):
        for engine in engines:
            engine.step()
            engine.check()
    assert all(engine.num_running for engine in engines)
    cache.add("nobody's", [1, 2, 3], groups=DRAFT)
    engines[0].check()
    with pytest.raises(BrokenInvariantError, match="nobody's, which has ended"):
        engines[1].check()


def test_memory_is_taken_from_guests_before_anybody_is_preempted():
    """As much memory as all sequences need to the end, most of it lent at first."""
    cache = PagedKVCache((*TARGET, *DRAFT), 26)
    engine = make_engine(runner=ToyRunner(TARGET, 26), cache=cache, budget=64)
    for i in range(4):
        engine.submit(request(f"r{i}", [i, 6, 7, 8, 9], max_tokens=17, ignore_eos=True))
    answers = Answers()
    answers.take(engine.step())
    for sequence in engine.running:
        guest = ("draft", sequence.key)
        cache.add(guest, sequence.token_ids, groups=DRAFT, host=sequence.key)
        cache.reserve(guest, 0, 24)
    assert cache.pool.num_available < 6
    drain(engine, answers)
    assert engine.num_preemptions == 0
    assert all(len(answer.token_ids) == 17 for answer in answers.values())
    assert cache.pool.num_referenced == 0


def test_who_waits_is_admitted_into_memory_that_was_lent_and_guests_stay_where_that_would_not_do():
    cache = PagedKVCache((*TARGET, *DRAFT), 12)
    engine = make_engine(runner=ToyRunner(TARGET, 12), cache=cache, budget=64)
    engine.submit(request("first", [5, 6, 7, 8, 9], max_tokens=20, ignore_eos=True))
    engine.step()
    (first,) = engine.running
    guest = ("draft", first.key)
    cache.add(guest, first.token_ids, groups=DRAFT, host=first.key)
    cache.reserve(guest, 0, 48)
    engine.submit(request("too much for now", [1] * 43, max_tokens=1, ignore_eos=True))
    engine.step()
    assert engine.num_running == 1
    assert guest in cache
    engine.submit(request("fits", [2] * 20, priority=-1, max_tokens=2, ignore_eos=True))
    engine.step()
    assert engine.num_running == 2
    assert guest not in cache
    drain(engine)
    assert engine.num_preemptions == 0
    assert cache.pool.num_referenced == 0
