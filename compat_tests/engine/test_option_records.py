"""What a request says of its sampling reaches its rows as it was said."""

from types import SimpleNamespace

import numpy as np

from helix_gateway.core.request import SamplingParams
from helix_gateway.engine.batch import sampling_rows
from helix_gateway.engine.option_records import join_records, option_record
from helix_gateway.engine.token_edits import NO_EDITS


def test_options_come_out_of_records_as_they_went_in():
    told = [
        SamplingParams(),
        SamplingParams(temperature=0.3, top_k=7, top_p=0.9, min_p=0.05, seed=2**64 - 1),
        SamplingParams(temperature=0.0, seed=-1),
    ]
    options = join_records([option_record(params, choice) for choice, params in enumerate(told)])
    assert options["choice"].tolist() == [0, 1, 2]
    assert options["seed"].tolist() == [0, 2**64 - 1, 2**64 - 1]
    for name in ("temperature", "top_p", "min_p"):
        assert options[name].tolist() == [float(np.float32(getattr(params, name))) for params in told]
    assert options["top_k"][1] == 7


def test_no_vocabulary_is_larger_than_a_rank_that_was_not_asked_for():
    huge = 10**12
    options = join_records([option_record(SamplingParams(top_k=top_k), 0) for top_k in (None, huge)])
    assert (options["top_k"] == np.iinfo(np.int32).max).all()


def test_a_batch_of_nobody_has_no_options():
    assert join_records([]).size == 0


def test_each_row_of_a_sequence_is_sampled_as_its_request_says():
    told = [
        SamplingParams(temperature=0.5, top_k=9, top_p=0.25, min_p=0.125, seed=3),
        SamplingParams(top_k=2, seed=2**63),
    ]
    sequences = [SimpleNamespace(option_record=option_record(params, 4 + place)) for place, params in enumerate(told)]
    places = np.arange(5, dtype=np.int32)
    rows = sampling_rows(
        sequences,
        (3, 2),
        8,
        logits_index=places,
        position=places + 10,
        edits=NO_EDITS,
        allowed=None,
    )
    of_row = [told[0]] * 3 + [told[1]] * 2
    assert rows.choice.tolist() == [4, 4, 4, 5, 5]
    assert rows.top_k.tolist() == [8, 8, 8, 2, 2]  # there are no more tokens
    for name in ("seed", "temperature", "top_p", "min_p"):
        assert getattr(rows, name).tolist() == [getattr(params, name) for params in of_row]
    columns = [rows.seed, rows.choice, rows.position, rows.temperature, rows.top_k, rows.top_p, rows.min_p]
    kinds = [np.uint64, np.int32, np.int32, np.float32, np.int32, np.float32, np.float32]
    assert [column.dtype for column in columns] == kinds
    # Any other layout would be another signature of the compiled sampler.
    assert all(column.flags.c_contiguous and column.flags.writeable for column in columns)
