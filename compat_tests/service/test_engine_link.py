"""What becomes of commands and replies between the two ends of an engine's connection, and when an engine is gone.

The engines here only talk.
"""

import asyncio
import itertools
import os
import signal
import socket
import sys
import textwrap
import threading
import time
from importlib import import_module
from importlib.util import find_spec

import pytest

from compat_tests.scraping import Scrape
from helix_gateway.core.errors import ModelLoadError
from helix_gateway.core.event import SequenceStart, TokenEvent
from helix_gateway.service import engine_link, launch, process
from helix_gateway.service.gateway_link import GatewayLink
from helix_gateway.service.loop import Closed
from helix_gateway.service.messages import Alive, Cancel, Events, Invalid, Ready
from helix_gateway.service.observer import EngineObserver
from helix_gateway.service.settings import EngineSettings
from helix_gateway.service.wire import Frames, command_encoder, framed, reply_decoder
from helix_gateway.telemetry.metrics import Metrics

ENGINE = """
import os, socket, subprocess, sys, time
from helix_gateway.service.gateway_link import GatewayLink
from helix_gateway.service.messages import Alive, Invalid, Ready
from helix_gateway.service.wire import framed

connection = socket.socket(fileno=int(sys.argv[-1]))
link = GatewayLink(connection)
tell = link.tell
"""


@pytest.fixture
def loading(tmp_path, monkeypatch):
    """Starts an engine that does as told."""

    async def loading(then):
        script = tmp_path / "engine.py"
        script.write_text(ENGINE + textwrap.dedent(then))
        monkeypatch.setattr(launch, "ENGINE_COMMAND", (sys.executable, str(script)))
        return await process._start_engine(EngineSettings(model_path="none"))

    return loading


@pytest.fixture
def started(loading):
    """Starts an engine that is ready and then does as told."""

    async def started(then):
        link = await loading("tell(Ready(64, 16))\n" + textwrap.dedent(then))
        assert await link.first_reply() == Ready(64, 16)
        return link

    return started


@pytest.fixture
def listening(started):
    """The same; answers with what it said once it counts as gone, and why."""

    async def listening(then, silence_s=60.0):
        link = await started(then)
        try:
            heard = []
            with pytest.raises(Exception) as gone:
                await link.listen(heard.append, silence_s)
        finally:
            await link.close()
        return heard, gone.value

    return listening


async def test_what_an_engine_said_before_it_ended_is_told(listening):
    heard, gone = await listening("for _ in range(2000): tell(Alive())\nlink.close()\nsys.exit(7)")
    assert heard == [Alive()] * 2000
    assert (type(gone), str(gone)) == (engine_link.EngineGone, "exit code 7")


async def test_what_an_engine_said_while_nobody_listened_is_told(started):
    link = await started("for _ in range(3): tell(Alive())\ntime.sleep(60)")
    try:
        await asyncio.sleep(0.5)
        heard = []
        with pytest.raises(engine_link.EngineGone, match="nothing for 1 s"):
            await link.listen(heard.append, 1.0)
        assert heard == [Alive()] * 3
    finally:
        await link.close()


async def test_an_engine_that_is_killed_is_gone_at_once_and_nothing_that_it_said_is_lost(started):
    link = await started("for n in range(500): tell(Invalid(str(n), 'x' * 3000))\ntell(Alive())\ntime.sleep(60)")
    heard = []

    def take(reply):
        if not heard:
            time.sleep(0.2)  # behind this much is still on its way
        heard.append(reply)
        if reply == Alive():
            os.kill(link.process.pid, signal.SIGKILL)

    try:
        with pytest.raises(engine_link.EngineGone, match="signal 9 ended it"):
            await asyncio.wait_for(link.listen(take, 60.0), 20)
        assert [reply.request_id for reply in heard[:-1]] == [str(n) for n in range(500)]
        assert not link.send(Cancel("too late"))
    finally:
        await link.close()


async def test_an_engine_that_leaves_a_process_behind_is_gone_all_the_same(listening):
    """Whoever inherited the engine's end keeps the connection open."""
    heard, gone = await listening(
        "tell(Alive())\nsubprocess.Popen(['sleep', '5'], pass_fds=(connection.fileno(),))\nos._exit(4)"
    )
    assert heard == [Alive()]
    assert str(gone) == "exit code 4"


async def test_an_engine_that_hangs_up_and_does_not_end_is_gone(listening):
    heard, gone = await listening("tell(Alive())\nlink.close()\ntime.sleep(60)")
    assert heard == [Alive()]
    assert str(gone) == "it has closed its connection"


async def test_an_engine_is_gone_once_it_has_been_silent_for_so_long_and_not_before(listening):
    heard, gone = await listening("for _ in range(30):\n    tell(Alive())\n    time.sleep(0.1)\ntime.sleep(60)", 2.0)
    assert len(heard) == 30
    assert (type(gone), str(gone)) == (engine_link.EngineGone, "it has said nothing for 2 s")


@pytest.mark.parametrize("spoke_after_s, looks", [(0.8, 20), (0.8, 1), (1.8, 20)])
async def test_a_gateway_that_stood_still_does_not_blame_an_engine_that_spoke_meanwhile_or_stood_still_with_it(
    started, monkeypatch, spoke_after_s, looks
):
    """As after SIGSTOP and SIGCONT: time is over, and nothing that has come is read yet."""
    monkeypatch.setattr(engine_link, "_LOOKS", looks)
    selector = asyncio.get_running_loop()._selector
    link = await started(f"tell(Alive())\ntime.sleep({spoke_after_s})\ntell(Alive())\ntime.sleep(60)")
    heard = []

    def interrupted(_timeout_s=None):
        del selector.select
        time.sleep(1.5)
        return []

    try:
        while not link._unheard:  # noqa: ASYNC110 - nothing says when
            await asyncio.sleep(0.01)
        selector.select = interrupted
        with pytest.raises(engine_link.EngineGone, match="nothing for 1 s"):
            await link.listen(heard.append, 1.0)
        assert heard == [Alive()] * 2
    finally:
        await link.close()


async def test_an_engine_is_ended_and_its_pipe_closed_even_if_nobody_waits_for_that(started):
    link = await started("time.sleep(60)")
    closing = asyncio.create_task(link.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert link.process._process.stdin.closed
    assert await asyncio.wait_for(link.process.wait(), 20) == -signal.SIGKILL
    await asyncio.wait_for(link.close(), 20)


async def test_a_load_that_ends_with_what_makes_no_sense_says_so(loading):
    link = await loading("connection.send(framed(b'nonsense'))\ntime.sleep(60)")
    try:
        with pytest.raises(ModelLoadError, match=r"makes no sense: Expected"):
            await asyncio.wait_for(link.first_reply(), 20)
    finally:
        await link.close()


async def test_replies_that_make_no_sense_are_an_error(listening):
    heard, gone = await listening("tell(Alive())\nconnection.send(framed(b'nonsense'))\ntime.sleep(60)")
    assert heard == [Alive()]
    assert "nonsense" in str(gone) or "msgpack" in str(gone).lower() or "Expected" in str(gone)


def run_with_uvloop(main):
    import_module("uvloop").run(main)


without_uvloop = pytest.mark.skipif(find_spec("uvloop") is None, reason="uvloop is not installed")


@pytest.mark.parametrize("run", [asyncio.run, pytest.param(run_with_uvloop, marks=without_uvloop)])
def test_a_flood_of_replies_leaves_the_loop_its_turns(started, run):
    heard, turns_heard = [], []

    async def turn():
        while len(heard) < 20_000:
            turns_heard.append(len(heard))
            await asyncio.sleep(0)

    async def scenario():
        link = await started("for n in range(20_000): tell(Invalid(str(n), 'x' * 1000))\ntime.sleep(60)")
        listening = asyncio.create_task(link.listen(heard.append, 60.0))
        try:
            await asyncio.wait_for(turn(), 60)
        finally:
            listening.cancel()
            await link.close()

    run(scenario())
    assert [reply.request_id for reply in heard] == [str(n) for n in range(20_000)]
    most = max(after - before for before, after in itertools.pairwise(turns_heard))
    assert most <= 2 * engine_link._READ_BYTES // 1000


@pytest.fixture
def pair():
    """A gateway's end, blocking, and an engine's."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(20)
        link = GatewayLink(theirs)
        yield ours, link
        link.close()


def read_replies(end, count):
    frames, replies = Frames(), []
    while len(replies) < count:
        replies += map(reply_decoder.decode, frames.take(end.recv(10_000)))
    return replies


def test_an_engine_never_waits_for_a_gateway_that_does_not_read_and_loses_nothing(pair):
    ours, link = pair
    told = [Invalid(str(n), "x" * 5000) for n in range(2000)]
    start_s = time.monotonic()
    for reply in told:
        link.tell(reply)
    # Generous, as the machine may be busy: one that waited, if only 10 ms each time, would take 20 s.
    assert time.monotonic() - start_s < 10
    assert read_replies(ours, 2000) == told
    link.tell(Alive())
    assert read_replies(ours, 1) == [Alive()]


def test_an_engine_that_ends_waits_until_its_last_word_is_taken(pair):
    ours, link = pair
    told = [Invalid(str(n), "x" * 5000) for n in range(200)]
    for reply in told:
        link.tell(reply)
    ended = threading.Thread(target=link.close)
    ended.start()
    assert read_replies(ours, 200) == told
    assert ours.recv(1) == b""
    ended.join()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc to count open files in")
def test_a_link_that_is_closed_leaves_no_thread_and_no_open_file_behind_read_or_not():
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for num_told in (0, 1, 200):  # the last are more than the connection takes
        ours, theirs = socket.socketpair()
        with ours:
            link = GatewayLink(theirs)
            for n in range(num_told):
                link.tell(Invalid(str(n), "x" * 5000))
            link.close()
            link.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)


def test_commands_come_whole_however_they_were_cut(pair):
    ours, link = pair
    commands = [Cancel("a" * 300), Cancel(""), Cancel("b" * 100_000)]
    stream = b"".join(framed(command_encoder.encode(command)) for command in commands)
    assert link.receive(0.0) == []
    received = []
    for start in range(0, len(stream), 997):
        ours.sendall(stream[start : start + 997])
        received += link.receive(0.0)
    assert received == commands


def test_waiting_for_commands_ends_when_one_comes_or_the_time_is_over(pair):
    ours, link = pair
    start_s = time.monotonic()
    assert link.receive(0.2) == []
    assert time.monotonic() - start_s >= 0.19
    threading.Timer(0.1, ours.sendall, [framed(command_encoder.encode(Cancel("a")))]).start()
    assert link.receive(30.0) == [Cancel("a")]
    assert time.monotonic() - start_s < 20


def test_an_engine_whose_gateway_is_gone_stops_asking(pair):
    ours, link = pair
    ours.close()
    link.tell(Alive())
    with pytest.raises(Closed):
        link.receive(0.0)


async def test_first_tokens_are_passed_on_first_and_nobody_waits_for_the_counting():
    metrics, woken = Metrics(), []
    service = process.ProcessService(EngineSettings(model_path="none"), None, EngineObserver(metrics, "none"))
    for name in ("old", "new"):
        service._in_flight.add(name, lambda event: woken.append((event.request_id, event.token_ids)))
    start = SequenceStart(
        queue_time_s=0.0, time_to_first_token_s=0.1, prompt_tokens=3, queried_tokens=0, cached_tokens=0
    )
    service._receive(
        Events(
            [
                TokenEvent(request_id="old", index=0, token_ids=[1]),
                TokenEvent(request_id="old", index=1, token_ids=[2]),
                TokenEvent(request_id="new", index=0, token_ids=[3], start=start),
            ]
        )
    )
    assert woken == [("new", [3]), ("old", [1]), ("old", [2])]
    assert Scrape(metrics.render("")[0].decode()).value("generation_tokens_total") == 0
    await asyncio.sleep(0)
    assert Scrape(metrics.render("")[0].decode()).value("generation_tokens_total") == 3
