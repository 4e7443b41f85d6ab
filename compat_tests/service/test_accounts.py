"""A host over the toy engine: an idle one recounts the cache's accounts, and what cannot be taken ends nothing."""

import pytest
from structlog.testing import capture_logs

from compat_tests.engine.toy import drain, make_engine, request
from helix_gateway.service.api import GenerationCall, StopStrings
from helix_gateway.service.host import EngineHost
from helix_gateway.service.loop import Closed, run_loop
from helix_gateway.service.messages import Invalid, NotTaken, PromptTooLong, Refused, Submit


@pytest.fixture
def host():
    """A host of the toy engine that has served one request."""
    made = object.__new__(EngineHost)
    made._tokenizer = None
    made._engine = make_engine(40, budget=64)
    made._served_since_check = True
    made._late = None
    made.engine.submit(request("first", range(1, 20)))
    drain(made.engine)
    return made


class IdleInbox:
    """Some commands, and then nobody says anything for a while."""

    def __init__(self, commands=()):
        self.turns = [list(commands), *[[]] * 20]

    def receive(self, timeout_s):
        if not self.turns:
            raise Closed
        return self.turns.pop(0)


def test_an_idle_engine_whose_accounts_agree_says_nothing_and_keeps_what_is_cached(host):
    cached = host.engine.cache.pool.num_cached
    with capture_logs() as lines:
        run_loop(host, IdleInbox(), [].append)
    assert not lines
    assert host.engine.cache.pool.num_cached == cached > 0


def test_an_idle_engine_that_has_lost_blocks_says_so_once_and_has_them_back(host):
    host.engine.cache.pool.allocate(5)
    with capture_logs() as lines:
        run_loop(host, IdleInbox(), [].append)
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("kv_cache_inconsistent", "error")
    assert "count" in line["broken"]
    assert host.engine.cache.pool.num_available == 40
    host.engine.submit(request("second", range(1, 20), ignore_eos=True))
    assert len(drain(host.engine)["second", 0].token_ids) == 8


def test_the_accounts_are_not_recounted_while_nothing_is_served(host):
    host.check_accounts()
    host.engine.cache.pool.allocate(5)
    with capture_logs() as lines:
        host.check_accounts()
    assert not lines


def refusals(host, request_, **stop):
    """What the loop tells of a call, and of the next one."""
    host._served_since_check = False
    told = []
    run_loop(host, IdleInbox([Submit(GenerationCall(request=request_, stop=StopStrings(**stop)))]), told.append)
    return [reply for reply in told if isinstance(reply, Refused)]


def test_a_call_that_breaks_the_engines_side_is_refused_and_the_loop_goes_on(host):
    # The toy host has no tokenizer, so stop strings break it.
    (refused,) = refusals(host, request("broken", [1, 2]), strings=("x",))
    assert isinstance(refused, NotTaken)
    assert "AttributeError" in refused.message
    assert not refusals(host, request("fine", [1, 2]))
    assert not host.has_work


@pytest.mark.parametrize(
    "prompt, kind", [([1] * 300, PromptTooLong), ([99], Invalid), ([], Invalid)], ids=["long", "unknown", "empty"]
)
def test_what_the_model_cannot_do_is_refused_by_its_kind(host, prompt, kind):
    (refused,) = refusals(host, request("wrong", prompt))
    assert isinstance(refused, kind)
