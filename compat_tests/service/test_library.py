"""Helix as a library: many prompts, streams, wrong options."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from helix_gateway import HelixEngine
from helix_gateway.core.errors import ContextLengthError, EngineUnavailableError, InvalidRequestError
from helix_gateway.service import helix_engine


@pytest.fixture(scope="module")
def engine(smollm2_path):
    with HelixEngine(smollm2_path, kv_cache_memory_bytes=256 << 20) as made:
        yield made


def test_one_prompt_and_many(engine):
    result = engine.generate("The capital of France is", max_tokens=6, temperature=0)
    assert "Paris" in result.text
    assert 0 < result.metrics.time_to_first_token_s <= result.metrics.token_times_s[-1]
    many = engine.generate(["The capital of France is", "One, two,"], max_tokens=6, temperature=0, n=2)
    assert many[0].text == result.text
    assert [len(each.choices) for each in many] == [2, 2]


async def test_it_answers_where_an_event_loop_runs_already_as_in_a_notebook(engine):
    assert "Paris" in engine.generate("The capital of France is", max_tokens=6, temperature=0).text
    with pytest.raises(ContextLengthError):
        engine.generate([[5] * 9000])


async def test_an_interrupted_answer_leaves_nothing_running_in_a_notebook(engine, monkeypatch):
    class Impatient(ThreadPoolExecutor):
        def submit(self, *call):
            running = super().submit(*call)

            def interrupted():
                while not engine._service.host.engine.num_running:
                    time.sleep(0.01)
                raise KeyboardInterrupt

            running.result = interrupted
            return running

    monkeypatch.setattr(helix_engine, "ThreadPoolExecutor", Impatient)
    with pytest.raises(KeyboardInterrupt):
        engine.generate("Once upon a time", max_tokens=4000, ignore_eos=True)
    monkeypatch.undo()
    assert engine.generate("Hi", max_tokens=1).finish_reason
    assert engine._service.host.engine.num_running == 0


async def test_a_stream_says_what_generate_says(engine):
    stream = [delta async for delta in engine.generate_stream("The capital of France is", max_tokens=6, temperature=0)]
    assert "Paris" in "".join(delta.text for delta in stream)
    assert stream[-1].finish_reason is not None


async def test_closing_a_stream_ends_the_request(engine):
    stream = engine.generate_stream("Once upon a time", max_tokens=4000, ignore_eos=True)
    await anext(stream)
    await stream.aclose()
    again = [delta async for delta in engine.generate_stream("Hi", max_tokens=1)]
    assert again[-1].finish_reason is not None
    assert engine._service.host.engine.num_running == 0


@pytest.mark.parametrize(
    "options, error",
    [
        ({"n": 0}, InvalidRequestError),
        ({"temperature": "warm"}, InvalidRequestError),
        ({"temperature": -1.0}, InvalidRequestError),
        ({"max_tokens": 0}, InvalidRequestError),
        ({"max_token": 4}, TypeError),
    ],
)
def test_a_wrong_option_is_refused_and_the_engine_serves_on(engine, options, error):
    with pytest.raises(error, match=next(iter(options))):
        engine.generate("Hi", **options)
    assert engine.generate("Hi", max_tokens=1).finish_reason


def test_a_prompt_that_is_too_long_is_refused(engine):
    with pytest.raises(ContextLengthError):
        engine.generate([[5] * 9000])


def test_a_closed_engine_says_so(smollm2_path):
    closed = HelixEngine(smollm2_path, kv_cache_memory_bytes=64 << 20)
    closed.close()
    with pytest.raises(EngineUnavailableError, match="stopped"):
        closed.generate("Hi")
