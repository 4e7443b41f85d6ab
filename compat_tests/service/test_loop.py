"""The loop that turns an engine: who comes within the batching window starts together."""

from collections import deque

import pytest

from compat_tests.engine.toy import make_engine, request
from helix_gateway.core.stats import EngineStats
from helix_gateway.service.api import GenerationCall
from helix_gateway.service.loop import Closed, run_loop
from helix_gateway.service.messages import Cancel, Events, Submit


class ToyHost:
    """What the loop needs of a host, over the toy engine."""

    def __init__(self):
        self.engine = make_engine()
        self.steps = []

    @property
    def has_work(self):
        return self.engine.has_work()

    def submit(self, call):
        self.engine.submit(call.request)

    def cancel(self, request_id):
        self.engine.cancel(request_id)

    def check_accounts(self):
        self.engine.check()

    def join_drafter(self):
        pass

    def step(self):
        events = self.engine.step()
        self.steps.append({event.request_id for event in events})
        return events


class ScriptedInbox:
    """Hands out one list of commands at each call, then closes once the engine is idle."""

    def __init__(self, host, script):
        self.host = host
        self.script = deque(script)

    def receive(self, timeout_s):
        if self.script:
            return self.script.popleft()
        if not self.host.has_work:
            raise Closed
        return []


def submit(name):
    return Submit(GenerationCall(request=request(name, [1, 2, 3], ignore_eos=True, max_tokens=3)))


@pytest.mark.parametrize("window_s, together", [(0.0, False), (0.2, True)])
def test_a_batching_window_waits_for_company_before_the_first_step(window_s, together):
    host = ToyHost()
    told = []
    run_loop(host, ScriptedInbox(host, [[submit("a")], [submit("b")]]), told.append, batch_window_s=window_s)
    assert (host.steps[0] == {"a", "b"}) is together
    events = [event for reply in told if isinstance(reply, Events) for event in reply.events]
    assert sum(len(event.token_ids) for event in events) == 6


def test_a_cancel_is_obeyed_before_the_next_step():
    host = ToyHost()
    told = []
    run_loop(host, ScriptedInbox(host, [[submit("a")], [Cancel("a")]]), told.append)
    assert len(host.steps) == 2
    assert told[-1].events[0].finish_reason == "abort"
    assert host.engine.cache.pool.num_referenced == 0


def test_figures_are_told_seldom_and_before_the_events_that_end_an_answer():
    host = ToyHost()
    told = []
    long = Submit(GenerationCall(request=request("long", [1, 2, 3], ignore_eos=True, max_tokens=60)))
    run_loop(host, ScriptedInbox(host, [[submit("a")], [long]]), told.append)
    assert len(host.steps) >= 60
    reports = [place for place, reply in enumerate(told) if isinstance(reply, EngineStats)]
    assert reports[0] == 0, "where an engine's counts begin is told before anything is counted"
    assert told[reports[-1]].num_running == told[reports[-1]].kv_blocks_referenced == 0
    assert reports[-1] == len(told) - 2
    assert told[-1].events[-1].finish_reason == "length"
    assert len(reports) <= 4, "the toy's sixty steps take a few tenths of a second"
