"""One level of load: requests sent in time, so many at once or so many a second, and what became of each.

Knows nothing about what is asked, nor about how figures are shown.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from helix_gateway.cli.openai_client import Api, OpenAIClient, ServerError


@dataclass(frozen=True, slots=True)
class Concurrency:
    """So many requests at once: the next is sent when one has ended (a closed loop)."""

    streams: int

    def __str__(self) -> str:
        return f"{self.streams} at once"


@dataclass(frozen=True, slots=True)
class PoissonRate:
    """So many requests a second, at random moments, however many are still running (an open loop)."""

    per_s: float
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.per_s:g} a second"


Load = Concurrency | PoissonRate

_PAUSE_AFTER_ERROR_S = 0.05
"""So that a closed loop does not run wild against a server that refuses at once."""


@dataclass(frozen=True, slots=True)
class Limit:
    """When no more requests are sent; those that run are waited for.  At least one of the two."""

    requests: int | None = None
    duration_s: float | None = None


@dataclass(slots=True)
class RequestRecord:
    """What one request was like for its client.  Times count from the moment at which it was due."""

    due_s: float
    """``time.perf_counter()`` when it should have been sent."""
    lag_s: float = 0.0
    """How much later it was sent: what this machine, not the server, is to blame for."""
    ttft_s: float | None = None
    """Until the first piece of text; None: none came."""
    e2e_s: float | None = None
    """Until the end of the answer; None: it did not come to its end."""
    gaps_s: list[float] = field(default_factory=list)
    """Between one piece of text and the next."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    counted_by_server: bool = False
    """False: the server told no usage, and ``output_tokens`` is the number of pieces."""
    finish_reason: str | None = None
    error: str | None = None
    status: int | None = None
    """HTTP status of a refusal."""

    @property
    def done(self) -> bool:
        """Whether it came to its end; where it neither did nor failed, it was cancelled."""
        return self.e2e_s is not None


async def ask(client: OpenAIClient, api: Api, body: bytes, record: RequestRecord) -> None:
    """Send one request and write down what becomes of it; a cancelled one leaves its record as far as it came."""
    record.lag_s = time.perf_counter() - record.due_s
    before_s = None
    try:
        async with aclosing(client.stream(api, body)) as pieces:
            async for piece in pieces:
                if piece.text or piece.reasoning:
                    if before_s is None:
                        record.ttft_s = piece.at_s - record.due_s
                    else:
                        record.gaps_s.append(piece.at_s - before_s)
                    before_s = piece.at_s
                record.finish_reason = piece.finish_reason or record.finish_reason
                if piece.usage is not None:
                    record.prompt_tokens = piece.usage.prompt_tokens
                    record.cached_tokens = piece.usage.cached_tokens
                    record.output_tokens = piece.usage.completion_tokens
                    record.counted_by_server = True
    except ServerError as error:
        record.error, record.status = str(error), error.status
        return
    finally:
        if not record.counted_by_server and before_s is not None:
            record.output_tokens = 1 + len(record.gaps_s)
    record.e2e_s = time.perf_counter() - record.due_s


def _nobody(_record: RequestRecord) -> None:
    pass


class Level:
    """One level of load against one server.

    Args:
        client: an open session.
        api: which of the server's routes.
        bodies: the requests, in order; as many as are wanted are taken.
        load: when they are sent.
        limit: how many.

    ``on_end`` is told of each request that ended, and may be set to any callable.
    """

    def __init__(
        self,
        client: OpenAIClient,
        api: Api,
        bodies: Iterator[bytes],
        load: Load,
        limit: Limit,
    ) -> None:
        self.load = load
        self.limit = limit
        self.on_end: Callable[[RequestRecord], None] = _nobody
        self.records: list[RequestRecord] = []
        self.started_s = 0.0
        self.elapsed_s = 0.0
        self.interrupted = False
        self._client = client
        self._api: Api = api
        self._bodies = bodies
        self._tasks: set[asyncio.Task[object]] = set()

    async def run(self) -> None:
        """Send all requests and wait for their ends, or for `interrupt`."""
        self.started_s = time.perf_counter()
        try:
            if isinstance(self.load, Concurrency):
                await self._run_closed(self.load)
            else:
                await self._run_open(self.load)
        finally:
            self.elapsed_s = time.perf_counter() - self.started_s
            for task in self._tasks:  # left over only where one of them, or whoever waits here, came to grief
                task.cancel()

    @property
    def running_s(self) -> float:
        """Seconds since the level began, while it runs."""
        return time.perf_counter() - self.started_s

    def interrupt(self) -> None:
        """Send no more and cancel what runs; `run` returns, and the records tell how far each came."""
        self.interrupted = True
        for task in self._tasks:
            task.cancel()

    async def _run_closed(self, load: Concurrency) -> None:
        for _ in range(load.streams):
            self._spawn(self._ask_in_turn())
        await self._wait_for_all()

    async def _ask_in_turn(self) -> None:
        while self._wants_more():
            record = await self._ask_one(time.perf_counter())
            if record.error is not None:
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    async def _run_open(self, load: PoissonRate) -> None:
        self._spawn(self._send_at_random(load))
        await self._wait_for_all()

    async def _send_at_random(self, load: PoissonRate) -> None:
        dice = random.Random(load.seed)
        due_s = self.started_s
        while True:
            due_s += dice.expovariate(load.per_s)
            await asyncio.sleep(due_s - time.perf_counter())
            if not self._wants_more():
                return
            self._spawn(self._ask_one(due_s))

    def _wants_more(self) -> bool:
        count, seconds = self.limit.requests, self.limit.duration_s
        enough = count is not None and len(self.records) >= count
        late = seconds is not None and time.perf_counter() - self.started_s >= seconds
        return not (self.interrupted or enough or late)

    async def _ask_one(self, due_s: float) -> RequestRecord:
        record = RequestRecord(due_s)
        self.records.append(record)
        await ask(self._client, self._api, next(self._bodies), record)
        self.on_end(record)
        return record

    def _spawn(self, work: Coroutine[None, None, object]) -> None:
        self._tasks.add(asyncio.ensure_future(work))

    async def _wait_for_all(self) -> None:
        """Wait until no task is left, those included that tasks start; raise what went wrong on our side."""
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            self._tasks -= done
            for task in done:
                if not task.cancelled():
                    task.result()
