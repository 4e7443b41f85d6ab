"""What one step has of the step before is what it would have had anyway."""

import random

import numpy as np
import pytest

from compat_tests.engine.toy import ONE_GROUP, TWO_GROUPS
from helix_gateway.core.request import SamplingParams
from helix_gateway.engine.batch_tables import BatchTables, block_tables
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.option_records import option_columns, option_record
from helix_gateway.engine.row_layout import row_layout


@pytest.mark.parametrize("windows", [[(1, 1)] * 3, [(1, 1), (7, 0), (4, 4), (9, 1)], [(5, 0)], []])
def test_rows_lie_behind_one_another_and_the_last_ones_choose(windows):
    layout = row_layout(tuple(rows for rows, _ in windows), tuple(sampled for _, sampled in windows))
    ends = [sum(rows for rows, _ in windows[: count + 1]) for count in range(len(windows))]
    chosen = [row for end, (_, sampled) in zip(ends, windows, strict=True) for row in range(end - sampled, end)]
    assert layout.cu_seqlens.tolist() == [0, *ends]
    assert layout.sampled_rows.tolist() == chosen
    assert layout.are_single == all(rows == 1 for rows, _ in windows)
    assert {array.dtype for array in layout[:3]} == {np.dtype(np.int32)}


def test_rows_have_the_options_of_their_own_sequence():
    warm, cold = SamplingParams(temperature=0.7, top_k=3, seed=5), SamplingParams(temperature=0.0, min_p=0.5)
    records = (option_record(warm, 0), option_record(cold, 1))
    for counts in ((1, 1), (3, 1), (1, 1)):
        columns = option_columns(records, counts, 40)
        assert columns.choice.tolist() == [0] * counts[0] + [1] * counts[1]
        assert columns.top_k.tolist() == [3] * counts[0] + [40] * counts[1]
        assert columns.seed.tolist()[: counts[0]] == [5] * counts[0]
    exchanged = option_columns(records[::-1], (1, 1), 40)
    assert exchanged.choice.tolist() == [1, 0]
    assert option_columns(records, (1, 1), 2).top_k.tolist() == [2, 2]


def as_told(keys, cache):
    """The block tables, from the blocks themselves."""
    groups = []
    for tables in zip(*[cache.tables(key) for key in keys], strict=True):
        rows = [[0] * table.num_released + table.blocks for table in tables]
        width = max(map(len, rows))
        groups.append([row + [0] * (width - len(row)) for row in rows])
    return groups


@pytest.mark.parametrize("groups", [ONE_GROUP, TWO_GROUPS])
def test_a_batch_has_the_tables_that_its_sequences_have_now(groups):
    dice, cache = random.Random(1), PagedKVCache(groups, 400)
    tables, lengths, made = BatchTables(cache), {}, 0
    for step in range(400):
        if dice.random() < 0.1 and len(lengths) < 6:
            prompt = list(range(dice.choice((5, 40))))
            lengths[made] = cache.add(made, prompt)
            made += 1
        if dice.random() < 0.05 and lengths:
            gone = dice.choice(list(lengths))
            cache.remove(gone)
            del lengths[gone]
        for key, length in lengths.items():
            window = dice.choice((1, 1, 1, 5))
            cache.reserve(key, length, length + window)
        keys = list(lengths)
        if dice.random() < 0.1:
            dice.shuffle(keys)
        if keys:
            got = tables.of(keys)
            assert [array.tolist() for array in got] == as_told(keys, cache), step
            assert [array.tolist() for array in block_tables(keys, cache)] == as_told(keys, cache), step
        for key in keys:
            lengths[key] += 1
            cache.commit(key, list(range(lengths[key])), lengths[key])
    assert made > 10


def test_a_batch_like_the_one_before_makes_no_table_anew_and_changes_none_that_was_given_out():
    cache = PagedKVCache(ONE_GROUP, 40)
    for key in ("a", "b"):
        cache.add(key, [1, 2, 3])
        cache.reserve(key, 0, 3)
    tables = BatchTables(cache)
    (first,) = tables.of(["a", "b"])
    before = first.copy()
    assert tables.of(["a", "b"])[0] is first
    cache.reserve("b", 3, 3 + 2 * ONE_GROUP[0].tokens_per_block)
    (longer,) = tables.of(["a", "b"])
    assert longer.shape[1] > first.shape[1]
    assert (first == before).all()
    (exchanged,) = tables.of(["b", "a"])
    assert (exchanged == longer[::-1]).all()
