"""Memory that is too short for drafts costs drafts alone, and for ever longer while it is found too short again."""

import itertools

import pytest
from structlog.testing import capture_logs

from compat_tests.engine.speculation_cases import as_told, wanted_of
from compat_tests.engine.test_model_drafter import answers_of, engine_with_draft_model
from compat_tests.engine.test_self_drafter import engine_with_self
from compat_tests.engine.toy import request
from helix_gateway.core.errors import OutOfMemoryError

ENGINES = {"model": engine_with_draft_model, "self": engine_with_self}


@pytest.fixture(params=ENGINES)
def engine_and_runner(request):
    engine, runner, *_ = ENGINES[request.param](budget=64)
    return engine, runner


def short_of_memory(runner, is_short, error=OutOfMemoryError):
    """Let a runner's forwards fail where ``is_short(how many there were)`` says so."""
    forward = runner.forward

    def short(batch):
        logits = forward(batch)
        if is_short(len(runner.batches)):
            raise error("no room")
        return logits

    runner.forward = short


def asked(max_tokens=100):
    return request("r", [1, 2, 3], max_tokens=max_tokens, ignore_eos=True)


@pytest.mark.parametrize("error", [OutOfMemoryError, MemoryError])
def test_a_shortage_costs_drafts_alone_and_is_left_alone_for_a_while(engine_and_runner, error):
    engine, runner = engine_and_runner
    short_of_memory(runner, lambda count: count >= 3, error)
    with capture_logs() as lines:
        assert as_told(answers_of(engine, [asked(40)])) == wanted_of(asked(40))
    assert {line["event"] for line in lines} == {"no_memory_for_drafts"}
    assert len(runner.batches) <= 3 + 40 // 16
    assert engine._budget.tokens == 64


def test_a_draft_that_breaks_off_at_its_second_token_is_the_same_shortage_again(engine_and_runner):
    engine, runner = engine_and_runner
    short_of_memory(runner, lambda count: count % 2 == 0)
    with capture_logs() as lines:
        answers_of(engine, [asked()])
    assert [line["steps_without"] for line in lines] == [16, 32, 64]


def test_shortages_far_apart_are_each_the_first(engine_and_runner):
    """A device without room for drafts now and then: what was drafted between two shortages ends the longer rests."""
    engine, runner = engine_and_runner
    failed_at = []

    def now_and_then(count):
        if count % 10 == 0:
            failed_at.append(steps)
        return count % 10 == 0

    short_of_memory(runner, now_and_then)
    engine.submit(asked(150))
    steps = 0
    while engine.has_work():
        engine.step()
        steps += 1
    gaps = [later - earlier for earlier, later in itertools.pairwise(failed_at)]
    assert len(gaps) > 2
    assert max(gaps) - min(gaps) <= 2
    # Sixteen steps' rest, and the few in which ten forwards draft: nobody rests once more for what all rested for.
    assert max(gaps) <= 16 + 5


def test_nothing_is_held_while_it_rests(engine_and_runner):
    engine, runner = engine_and_runner
    short_of_memory(runner, lambda count: count == 4)
    engine.submit(asked())
    while len(runner.batches) < 4:
        engine.step()
    assert not engine.cache._guests
    assert len(engine.cache._tables) == 1
