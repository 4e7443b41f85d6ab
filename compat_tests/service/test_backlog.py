"""What nobody reads: joined while it waits, in the order in which it came, and bounded."""

import asyncio
import sys

import pytest

from helix_gateway.core.errors import EngineUnavailableError, SlowReaderError
from helix_gateway.core.event import TokenEvent, TokenLogprobs
from helix_gateway.service import backlog as backlog_module
from helix_gateway.service.backlog import MAX_JOINED_TOKENS, MAX_REQUEST_BYTES, MAX_TOTAL_BYTES, Backlog, limit_bytes
from helix_gateway.service.messages import Events
from helix_gateway.service.wire import encoded, reply_decoder


def event(token, *, index=0, top=None, **fields):
    logprobs = None if top is None else [TokenLogprobs(token, -1.0, 1, list(range(999, 999 + top)), [-1.5] * top)]
    return TokenEvent(request_id="r", index=index, token_ids=[token], logprobs=logprobs, **fields)


def backlog(limit=MAX_REQUEST_BYTES):
    told = []
    return Backlog(lambda: limit, lambda: told.append("stop")), told


async def drained(waiting, count):
    """Events until ``count`` tokens have come."""
    events = []
    while sum(len(got.token_ids) for got in events) < count:
        events.append(await waiting.get())
    return events


async def test_a_choice_that_waits_is_read_in_fewer_pieces_and_whole():
    waiting, _ = backlog()
    for token in range(100):
        waiting.put(event(token, index=token % 2, top=1, finish_reason="stop" if token >= 98 else None))
    events = await drained(waiting, 100)
    for index in (0, 1):
        own = [got for got in events if got.index == index]
        tokens = [token for got in own for token in got.token_ids]
        assert tokens == list(range(index, 100, 2))
        assert [entry.token_id for got in own for entry in got.logprobs] == tokens
        assert [got.finish_reason for got in own] == [None] * (len(own) - 1) + ["stop"]
    assert len(events) == 4
    assert max(len(got.token_ids) for got in events) <= MAX_JOINED_TOKENS
    assert waiting.num_bytes == 0


async def test_the_prompts_logprobs_survive_joining_and_are_not_counted():
    waiting, told = backlog(10_000)
    waiting.put(event(1, prompt_logprobs=[None, *[TokenLogprobs(1, -1.0, 1, [1] * 20, [-1.0] * 20)] * 1000]))
    waiting.put(event(2))
    got = await waiting.get()
    assert (got.token_ids, len(got.prompt_logprobs), told) == ([1, 2], 1001, [])


async def test_a_reader_that_waits_is_woken():
    waiting, _ = backlog()
    reading = asyncio.create_task(waiting.get())
    await asyncio.sleep(0)
    waiting.put(event(7))
    assert (await reading).token_ids == [7]


async def test_what_came_before_an_error_is_read_before_it():
    waiting, _ = backlog()
    waiting.put(event(7))
    waiting.put(EngineUnavailableError("gone"))
    waiting.put(event(8))
    assert (await waiting.get()).token_ids == [7]
    for _ in range(2):
        with pytest.raises(EngineUnavailableError, match="gone"):
            await waiting.get()


async def test_beyond_the_bound_the_request_is_over_and_its_memory_free():
    waiting, told = backlog()
    count = 0
    while not told:
        waiting.put(event(count, top=20))
        count += 1
        assert waiting.num_bytes <= MAX_REQUEST_BYTES
    waiting.put(event(count, top=20))
    assert (told, waiting.num_bytes) == (["stop"], 0)
    assert 2000 < count < 4000
    with pytest.raises(SlowReaderError, match="4,096 KiB"):
        await waiting.get()


async def test_a_long_answer_without_logprobs_waits_whole():
    waiting, told = backlog()
    for token in range(80_000):
        waiting.put(event(token))
    assert told == []


def test_what_is_counted_is_about_what_is_taken():
    one = event(70_000, top=20)
    token = one.logprobs[0]
    parts = [one, one.token_ids, one.logprobs, token, token.top_ids, token.top_logprobs, 70_000, -1.0]
    taken = sum(map(sys.getsizeof, parts)) + sum(sys.getsizeof(part) for part in [*token.top_ids, *token.top_logprobs])
    assert taken < backlog_module._size_bytes(one) < 1.5 * taken


def test_many_requests_share_what_all_may_take():
    assert limit_bytes(0) == limit_bytes(1) == MAX_REQUEST_BYTES
    assert 1000 * limit_bytes(1000) <= MAX_TOTAL_BYTES


async def test_a_long_prompts_logprobs_cross_in_short_messages_and_are_read_whole():
    told = [None, *[TokenLogprobs(token, -1.0, 1, [1] * 20, [-1.0] * 20) for token in range(1000)]]
    others = [event(5, index=index) for index in (1, 2)]
    messages = list(encoded(Events([others[0], event(7, prompt_logprobs=told), others[1]])))
    assert max(map(len, messages)) < sum(map(len, messages)) / 3
    waiting, _ = backlog()
    for message in messages:
        for each in reply_decoder.decode(message).events:
            waiting.put(each)
    events = {got.index: got for got in await drained(waiting, 3)}
    assert events[0].prompt_logprobs == told
    assert (events[0].token_ids, events[1].prompt_logprobs) == ([7], None)
