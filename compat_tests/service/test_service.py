"""Calls through a service: text, stops, seeds, cancels; with the real tokenizer and the real model's engine."""

import asyncio
from contextlib import aclosing

import pytest

from helix_gateway.core.errors import ContextLengthError, EngineUnavailableError
from helix_gateway.core.event import TokenEvent
from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.service.api import GenerationCall, StopStrings
from helix_gateway.service.in_process import InProcessService
from helix_gateway.service.process import ProcessService
from helix_gateway.service.settings import EngineSettings
from helix_gateway.service.stops import ChoiceText, stop_condition
from helix_gateway.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def service(smollm2_path):
    made = InProcessService(EngineSettings(model_path=smollm2_path, kv_cache_memory_bytes=256 << 20, seed=1))
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return Tokenizer.load(smollm2_path)


def call(tokenizer, prompt, *, request_id="r", stop=(), include=False, **sampling):
    return GenerationCall(
        request=Request(
            request_id=request_id,
            prompt_token_ids=tokenizer.encode(prompt),
            sampling=SamplingParams(**{"temperature": 0.0, "max_tokens": 16, **sampling}),
        ),
        stop=StopStrings(strings=stop, include_in_output=include),
    )


async def text_of(service, call_):
    return "".join([delta.text async for delta in service.generate(call_)])


async def test_text_streams_and_ends(service, tokenizer):
    deltas = [delta async for delta in service.generate(call(tokenizer, "The capital of France is"))]
    assert "Paris" in "".join(delta.text for delta in deltas)
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].metrics.output_tokens == sum(len(delta.token_ids) for delta in deltas)


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_sequence_in_the_step_that_completes_it(service, tokenizer, include):
    plain = await text_of(service, call(tokenizer, "The capital of France is", ignore_eos=True))
    stop = plain[6:10]
    stopped = call(tokenizer, "The capital of France is", ignore_eos=True, stop=(stop,), include=include)
    deltas = [delta async for delta in service.generate(stopped)]
    text = "".join(delta.text for delta in deltas)
    end = plain.index(stop) + (len(stop) if include else 0)
    assert text == plain[:end]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    assert deltas[-1].metrics.output_tokens < 16


async def test_closing_a_stream_frees_its_blocks_within_a_step(service, tokenizer):
    endless = call(tokenizer, "Once upon a time", ignore_eos=True, max_tokens=None, n=3, temperature=1.0)
    async with aclosing(service.generate(endless)) as stream:
        await anext(stream)
        assert service.host.engine.cache.pool.num_referenced > 0
    for _ in range(100):
        await asyncio.sleep(0.02)
        if not service.host.engine.cache.pool.num_referenced:
            break
    assert service.host.engine.cache.pool.num_referenced == 0
    assert service.host.engine.num_running == 0


async def test_a_stream_that_nobody_began_to_read_ends_when_it_is_closed(service, tokenizer):
    stream = service.generate(call(tokenizer, "Once upon a time", ignore_eos=True, max_tokens=None))
    for _ in range(500):
        await asyncio.sleep(0.02)
        if service.host.engine.num_running:
            break
    assert service.host.engine.num_running == 1
    await stream.aclose()
    await stream.aclose()
    for _ in range(500):
        await asyncio.sleep(0.02)
        if not service.host.engine.cache.pool.num_referenced:
            break
    assert service.host.engine.cache.pool.num_referenced == 0
    assert len(service._in_flight) == 0
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_prompt_that_is_too_long_is_refused_before_the_first_delta(service, tokenizer):
    with pytest.raises(ContextLengthError):
        await text_of(service, call(tokenizer, "word " * 9000))


async def test_an_answer_does_not_depend_on_company(service, tokenizer):
    lonely = await text_of(service, call(tokenizer, "My name is", temperature=1.0, seed=3))
    company = [
        text_of(service, call(tokenizer, f"My name is {i}", request_id=f"c{i}", temperature=1.0, seed=i))
        for i in range(15)
    ]
    together = await asyncio.gather(text_of(service, call(tokenizer, "My name is", temperature=1.0, seed=3)), *company)
    assert together[0] == lonely


async def test_nobody_is_served_once_it_is_closed(smollm2_path, tokenizer):
    closed = InProcessService(EngineSettings(model_path=smollm2_path, kv_cache_memory_bytes=64 << 20), tokenizer)
    closed.close()
    with pytest.raises(EngineUnavailableError):
        await text_of(closed, call(tokenizer, "Hi"))


def test_a_small_cache_lowers_the_context_and_still_finishes_everybody(smollm2_path, tokenizer):
    """A pool of 1.2 contexts, sixteen requests."""
    context = 256
    # Keys and values of 64 bytes and a scale of four each, in 30 layers of three heads.
    token_bytes = 30 * 3 * 2 * (64 + 4)
    service = InProcessService(
        EngineSettings(
            model_path=smollm2_path, max_model_len=context, kv_cache_memory_bytes=int(1.2 * context * token_bytes)
        ),
        tokenizer,
    )

    async def all_of_them():
        # Two that run side by side already need more than there is.
        calls = [
            call(tokenizer, f"Number {i}. " * 10, request_id=f"r{i}", ignore_eos=True, max_tokens=110)
            for i in range(16)
        ]
        return await asyncio.gather(*(text_of(service, each) for each in calls))

    try:
        assert all(asyncio.run(all_of_them()))
        assert service.host.engine.num_preemptions > 0
        assert service.host.engine.cache.pool.num_referenced == 0
    finally:
        service.close()


def feed_all(call_, tokenizer, token_ids):
    """What both sides of the engine make of some tokens: (tokens until the stop, text)."""
    condition = stop_condition(tokenizer, call_)
    kept = []
    for token in token_ids:
        kept.append(token)
        if condition.feed([token]) is not None:
            break
    text = (
        ChoiceText(tokenizer, call_)
        .take(TokenEvent(request_id="r", index=0, token_ids=kept, finish_reason="stop"))
        .text
    )
    return len(kept), text


def test_stop_strings_are_not_looked_for_before_min_tokens(tokenizer):
    tokens = tokenizer.encode("one stop two stop three")
    assert feed_all(call(tokenizer, "x", stop=(" stop",)), tokenizer, tokens) == (2, "one")
    assert feed_all(call(tokenizer, "x", stop=(" stop",), min_tokens=2), tokenizer, tokens) == (4, "one stop two")


async def test_what_may_be_asked_at_once_is_taken(service, tokenizer):
    few = EngineSettings(model_path=service._settings.model_path, max_num_seqs=3, max_queue_len=4)
    assert ProcessService(few, tokenizer).max_sequences == 7
