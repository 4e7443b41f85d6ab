"""What a request says of its sampling reaches its rows as it was said."""

import numpy as np

from helix_gateway.core.request import SamplingParams
from helix_gateway.engine.option_records import join_records, option_record


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
