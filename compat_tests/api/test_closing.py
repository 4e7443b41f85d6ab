"""Streams are closed as far as they can be."""

import pytest

from helix_gateway.gateway.generation import Merged, close, closing
from helix_gateway.service.api import TextDelta


class Unclosable:
    """A stream that holds nothing which would have to be closed."""

    def __aiter__(self):
        return self

    async def __anext__(self):
        return TextDelta(index=0, text="a", token_ids=[97])


async def generated(ends):
    try:
        while True:
            yield TextDelta(index=0, text="a", token_ids=[97])
    finally:
        ends.append("closed")


async def left_by(how, stream):
    if how == "close":
        await close(stream)
    elif how == "closing":
        async with closing(stream) as same:
            assert same is stream
    else:
        await Merged([stream], 1).aclose()


@pytest.mark.parametrize("how", ["close", "closing", "merged"])
async def test_a_generator_is_closed_and_what_cannot_be_closed_is_left(how):
    ends = []
    stream = generated(ends)
    await anext(stream)
    await left_by(how, stream)
    assert ends == ["closed"]
    await left_by(how, Unclosable())
