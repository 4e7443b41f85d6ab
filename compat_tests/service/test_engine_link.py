"""What becomes of an engine's replies on their way in, and when an engine counts as gone; the engines here only talk."""

import asyncio
import sys
import textwrap
import time

import pytest
import zmq
import zmq.asyncio

from helix_gateway.service import launch, process
from helix_gateway.service.messages import Alive, Ready
from helix_gateway.service.settings import EngineSettings
from helix_gateway.service.wire import encoded

ENGINE = """
import sys, time
import msgspec, zmq
from helix_gateway.service.engine_process import Assignment
from helix_gateway.service.messages import Alive, Ready
from helix_gateway.service.wire import encoded

assignment = msgspec.json.decode(sys.stdin.buffer.readline(), type=Assignment)
context = zmq.Context()
replies = context.socket(zmq.PUSH)
replies.connect(assignment.replies)


def tell(reply):
    for message in encoded(reply):
        replies.send(message)


tell(Ready(64, 16))
"""


@pytest.fixture
def listening(tmp_path, monkeypatch):
    """Starts an engine that is ready and then does as told; answers with what it said once it counts as gone, and why."""

    async def listening(then, silence_s=60.0):
        script = tmp_path / "engine.py"
        script.write_text(ENGINE + textwrap.dedent(then))
        monkeypatch.setattr(launch, "ENGINE_COMMAND", (sys.executable, str(script)))
        link = await process._start_engine(EngineSettings(model_path="none"))
        try:
            assert await link.first_reply() == Ready(64, 16)
            heard = []
            with pytest.raises(Exception) as gone:
                await link.listen(heard.append, silence_s)
        finally:
            await link.close()
        return heard, gone.value

    return listening


async def test_what_an_engine_said_before_it_ended_is_told(listening):
    heard, gone = await listening("for _ in range(2000): tell(Alive())\nreplies.close()\ncontext.term()\nsys.exit(7)")
    assert heard == [Alive()] * 2000
    assert (type(gone), str(gone)) == (process.EngineGone, "exit code 7")


async def test_an_engine_is_gone_once_it_has_been_silent_for_so_long_and_not_before(listening):
    heard, gone = await listening("for _ in range(30):\n    tell(Alive())\n    time.sleep(0.1)\ntime.sleep(60)", 2.0)
    assert len(heard) == 30
    assert (type(gone), str(gone)) == (process.EngineGone, "it has said nothing for 2 s")


async def test_replies_that_make_no_sense_are_an_error(listening):
    heard, gone = await listening("tell(Alive())\nreplies.send(b'nonsense')\ntime.sleep(60)")
    assert heard == [Alive()]
    assert "nonsense" in str(gone) or "msgpack" in str(gone).lower() or "Expected" in str(gone)


class LivingProcess:
    """Stands in for an engine's process that never ends by itself."""

    pid = returncode = None

    def __init__(self):
        self._ended = asyncio.get_running_loop().create_future()

    def wait(self):
        return self._ended

    def kill(self):
        self._ended.set_result(-9)

    def close(self):
        pass


class NoFiles:
    def close(self):
        pass


async def test_a_reply_that_comes_while_the_loop_looks_for_an_end_wakes_its_reader(monkeypatch):
    """The signal that a message has come is given once: whoever looks must not keep it from who waits for it."""
    replies, engine = zmq.asyncio.Context.instance().socket(zmq.PULL), zmq.Context.instance().socket(zmq.PUSH)
    engine.connect(f"tcp://127.0.0.1:{replies.bind_to_random_port('tcp://127.0.0.1')}")
    link = process._EngineLink(LivingProcess(), zmq.Context.instance().socket(zmq.PUSH), replies, NoFiles())
    wait, waits, heard = asyncio.wait, [], []

    def say_something():
        for message in encoded(Alive()):
            engine.send(message)

    async def say_something_after_the_first(*arguments, **options):
        found = await wait(*arguments, **options)
        waits.append(found)
        if len(waits) == 1:
            say_something()
            time.sleep(0.1)  # noqa: ASYNC251 - so that the message is there before the loop looks again
        return found

    monkeypatch.setattr(asyncio, "wait", say_something_after_the_first)

    class Enough(Exception):
        pass

    def take(reply):
        heard.append(reply)
        if len(heard) == 3:
            raise Enough

    async def talk():
        while True:
            await asyncio.sleep(0.3)
            if waits:
                say_something()

    talking = asyncio.create_task(talk())
    try:
        with pytest.raises(Enough):
            await asyncio.wait_for(link.listen(take, 0.5), 10)
    finally:
        talking.cancel()
        await link.close()
        engine.close(linger=0)
    assert heard == [Alive()] * 3
