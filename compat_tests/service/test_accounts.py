"""What an operator sees of the cache's accounts: an idle engine recounts them, says so if they are wrong, and serves on."""

import pytest
from structlog.testing import capture_logs

from compat_tests.engine.toy import drain, make_engine, request
from helix_gateway.service.host import EngineHost
from helix_gateway.service.loop import Closed, run_loop


@pytest.fixture
def host():
    """A host of the toy engine that has served one request."""
    made = object.__new__(EngineHost)
    made._engine = make_engine(40, budget=64)
    made._served_since_check = True
    made.engine.submit(request("first", range(1, 20)))
    drain(made.engine)
    return made


class IdleInbox:
    """Nobody says anything, three times."""

    def __init__(self):
        self.left = 3

    def receive(self, timeout_s):
        self.left -= 1
        if self.left < 0:
            raise Closed
        return []


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
