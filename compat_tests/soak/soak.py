"""A real `helix serve` of a tiny model under random visitors and engine kills, and what must be true of it afterwards.

The same run is a test of a minute, of an hour (`--deep`), and a script that draws a picture (`benchmarks/soak.py`).
"""

import asyncio
import math
import os
import re
import signal
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
import psutil

from compat_tests.soak.asks import Asker
from compat_tests.soak.visitors import Complaint, Visitor, make_dice, moods

HUNG_S = 120.0
"""A request without an end for so long hangs."""
AFTERMATH_S = 3.0
"""For so long after an engine is back, requests that it took with it may still be told."""
BAD_LINES = re.compile(r"kv_cache_inconsistent|step_failed|commit_failed|submit_failed|Traceback|never retrieved")


@dataclass
class Memory:
    """Resident bytes of both processes at one moment."""

    at_s: float
    gateway_bytes: int
    engine_pid: int
    engine_bytes: int


@dataclass
class Report:
    """What a soak saw."""

    seconds: float = 0.0
    requests: int = 0
    outcomes: Counter = field(default_factory=Counter)
    moods: Counter = field(default_factory=Counter)
    complaints: list = field(default_factory=list)
    kills: list = field(default_factory=list)
    recoveries: list = field(default_factory=list)
    memory: list = field(default_factory=list)
    blocks_referenced: float | None = None
    compared: int = 0
    """Answers that had been given before and were held against that."""

    def complain(self, what):
        """Keep a complaint, the first hundred of them."""
        self.outcomes["complaint"] += 1
        if len(self.complaints) < 100:
            self.complaints.append(what)

    def growth(self, of):
        """By what share memory grew over the last half, ``of`` one process: "gateway" or "engine"."""
        last_pid = self.memory[-1].engine_pid
        # A new engine warms up: the first third of its life does not count.
        born_s = self.recoveries[-1] if self.recoveries else 0.0
        since_s = max(self.seconds / 2, born_s + (self.seconds - born_s) / 3)
        sizes = [
            getattr(moment, f"{of}_bytes")
            for moment in self.memory
            if moment.at_s >= since_s and moment.engine_pid == last_pid
        ]
        part = max(1, len(sizes) // 5)
        return statistics.median(sizes[-part:]) / statistics.median(sizes[:part]) - 1


class Soak:
    """One run.

    Args:
        server: a running server of `asks.save_tiny_model`.
        seconds: how long; ``num_requests`` may end it earlier.
        kill_at: shares of the time at which the engine is killed.
    """

    def __init__(self, server, *, seconds, num_requests=None, visitors=16, kill_at=(), seed=0):
        self._server = server
        self._seconds = seconds
        self._most = num_requests
        self._num_visitors = visitors
        self._kill_at = kill_at
        self._seed = seed
        self._asker = Asker(seed)
        self._known = {}
        self._troubled_until = 0.0
        self.report = Report()

    async def run(self):
        """All of it; the report."""
        self._began = time.monotonic()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=HUNG_S)) as session:
            self._session = session
            watching = asyncio.create_task(self._watch())
            killing = asyncio.create_task(self._kill())
            await asyncio.gather(*(self._visit(number) for number in range(self._num_visitors)))
            await killing
            watching.cancel()
            self.report.seconds = self.elapsed_s()
            self.report.blocks_referenced = await self._quiet_blocks()
        bad = [line for line in self._server.lines if BAD_LINES.search(line)]
        self.report.complaints += bad[:20]
        return self.report

    def elapsed_s(self):
        """Seconds since it began."""
        return time.monotonic() - self._began

    def _over(self):
        if self._troubled_until == math.inf:  # what comes after a kill is what it was for
            return False
        return self.elapsed_s() > self._seconds or (self._most is not None and self.report.requests >= self._most)

    async def _visit(self, number):
        dice = make_dice(self._seed * 1000 + number)
        visitor = Visitor(self._session, self._server.url, dice)
        while not self._over():
            self.report.requests += 1
            began = time.monotonic()
            mood, ask, doing = moods(visitor, self._asker, dice)
            self.report.moods[mood] += 1
            try:
                outcome, choices = await doing
                self._judge(ask, outcome, choices, began, visitor.last_error)
            except asyncio.TimeoutError:
                self.report.complain(f"{mood}: no end after {HUNG_S:.0f} s: {ask}")
            except (Complaint, aiohttp.ClientError, OSError, KeyError, ValueError) as error:
                self.report.complain(f"{mood}: {type(error).__name__}: {error}: {ask}")
            if self._troubled_until == math.inf:
                await asyncio.sleep(0.5)

    def _judge(self, ask, outcome, choices, began, error):
        self.report.outcomes[outcome] += 1
        if outcome in ("left", "cut"):
            return
        if "engine_unavailable" in outcome:
            if began > self._troubled_until:
                raise Complaint("engine_unavailable, but nobody killed it")
            return
        status = 200 if outcome in ("answered", "streamed") else int(outcome.split()[0])
        if status not in (ask.status, 429):
            raise Complaint(f"{outcome} where {ask.status} was due: {error}")
        if status == 200:
            self._compare(ask, choices)

    def _compare(self, ask, choices):
        if len(choices) != ask.choices or any(ending not in ("stop", "length") for _, ending in choices.values()):
            raise Complaint(f"choices are missing or do not end: {choices}")
        if ask.known_as is None:
            return
        before = self._known.setdefault(ask.known_as, choices)
        self.report.compared += before is not choices
        if before != choices:
            raise Complaint(f"another answer than before: {choices}, {before}")

    def _engine(self):
        children = psutil.Process(self._server.process.pid).children()
        for child in children:
            with suppress(psutil.Error):  # it may end while it is looked at
                if any("engine_process" in word for word in child.cmdline()):
                    return child
        return None

    async def _kill(self):
        planned_s = self._seconds
        for share in self._kill_at:
            await wait_until(lambda share=share: self._over() or self.elapsed_s() > share * planned_s)
            engine = self._engine()
            if self._over() or engine is None:
                return
            self._troubled_until, down = math.inf, self.elapsed_s()
            self.report.kills.append(self.elapsed_s())
            os.kill(engine.pid, signal.SIGKILL)
            await self._wait_for_successor(engine.pid)
            self.report.recoveries.append(self.elapsed_s())
            self._troubled_until = time.monotonic() + AFTERMATH_S
            self._seconds += self.elapsed_s() - down  # an engine that starts serves nobody

    async def _wait_for_successor(self, pid):
        await wait_until(lambda: (engine := self._engine()) is not None and engine.pid != pid)
        while True:
            async with self._session.get(self._server.url + "/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.2)

    async def _watch(self):
        gateway = psutil.Process(self._server.process.pid)
        while True:
            engine = self._engine()
            if engine is not None:
                with suppress(psutil.Error):  # it may end while it is looked at
                    self.report.memory.append(
                        Memory(self.elapsed_s(), gateway.memory_info().rss, engine.pid, engine.memory_info().rss)
                    )
            await asyncio.sleep(min(5.0, self._seconds / 100))

    async def _quiet_blocks(self):
        """Blocks that are still referenced once nobody asks any more."""
        for _ in range(100):
            async with self._session.get(self._server.url + "/metrics") as response:
                text = await response.text()
            blocks = float(re.search(r"^helix:kv_blocks_referenced\{.*\} (\S+)$", text, re.MULTILINE)[1])
            if blocks == 0:
                return blocks
            await asyncio.sleep(0.1)
        return blocks


async def wait_until(holds):
    """Look again and again."""
    while True:
        if holds():
            return
        await asyncio.sleep(0.1)
