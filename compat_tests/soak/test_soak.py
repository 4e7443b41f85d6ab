"""Random visitors, disconnects and engine kills for a while: nothing is lost, nothing hangs, nobody is told nonsense."""

import asyncio

import pytest

from compat_tests.effort import deeply
from compat_tests.serving import start_server, stop_server
from compat_tests.soak.asks import save_tiny_model
from compat_tests.soak.soak import Soak

pytestmark = pytest.mark.alone

SECONDS = deeply(60, 3600)
# Kills in the first half, so that the second one shows whether memory grows.
KILL_AT = deeply([0.4], [share / 100 for share in range(5, 50, 5)])
GROWTH = deeply(0.05, 0.02)
"""Over the last half.  A minute is too short for caches to have come to rest."""


@pytest.mark.timeout(SECONDS + 300)
def test_a_server_that_everybody_mistreats_serves_on(tmp_path):
    # 2,048 tokens: 2 layers of 2 heads, keys and values of 16 bytes and a scale each.
    server = start_server(save_tiny_model(tmp_path), "--kv-cache-memory", "320KiB", "--log-level", "warning")
    try:
        report = asyncio.run(Soak(server, seconds=SECONDS, kill_at=KILL_AT).run())
    finally:
        assert stop_server(server) == 0
    print(report.requests, report.outcomes, report.kills, report.growth("gateway"), report.growth("engine"))
    assert not report.complaints, report.complaints[:5]
    assert report.blocks_referenced == 0
    assert len(report.kills) == len(KILL_AT)
    assert report.compared > report.requests / 20
    assert report.growth("gateway") < GROWTH
    assert report.growth("engine") < GROWTH
