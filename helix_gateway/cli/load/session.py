"""Several levels of load against one server, one after another, on one session: warm up, run each, sum up.

What `helix bench` runs, and what a benchmark of its own may run just as well.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from helix_gateway.cli.load.level import Level, Limit, Load, PoissonRate, RequestRecord, ask
from helix_gateway.cli.load.prompts import Prompt, RequestOptions, synthetic
from helix_gateway.cli.load.summary import LevelSummary, summarise
from helix_gateway.cli.openai_client import OpenAIClient, ServerError

OnEnd = Callable[[RequestRecord], None]

_WARM_UP_TOKENS = 8
_REQUESTS_AT_LEAST = 16
_REQUESTS_PER_STREAM = 4
_SECONDS_OF_RATE = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    options: RequestOptions
    loads: list[Load]
    limit: Limit
    """Of each level; without either bound, `usual_requests`."""
    warm_up: int = 2
    """Requests sent before the first level, and not counted."""


def usual_requests(load: Load) -> int:
    """How many requests make a level where nobody says: four a stream, or twenty seconds' worth; at least sixteen."""
    wanted = load.per_s * _SECONDS_OF_RATE if isinstance(load, PoissonRate) else load.streams * _REQUESTS_PER_STREAM
    return max(_REQUESTS_AT_LEAST, round(wanted))


def limit_of(load: Load, limit: Limit) -> Limit:
    """The bound of one level."""
    if limit.requests is None and limit.duration_s is None:
        return Limit(requests=usual_requests(load))
    return limit


def _unwatched(_level: Level) -> AbstractContextManager[OnEnd]:
    return nullcontext(lambda _record: None)


@dataclass(slots=True)
class Session:
    """The levels of a plan, run in order.

    ``watch`` opens a display for each level and yields what to tell of every request that ended.
    """

    client: OpenAIClient
    plan: Plan
    prompts: Iterator[Prompt]
    watch: Callable[[Level], AbstractContextManager[OnEnd]] = _unwatched
    summaries: list[LevelSummary] = field(default_factory=list)
    interrupted: bool = False
    _level: Level | None = None

    async def run(self) -> None:
        """Warm up and run all levels; after `interrupt` the summaries are of what was had until then.

        Raises:
            ServerError: the first request of the warm-up failed, so the rest would too.
        """
        await self._warm_up()
        bodies = (self.plan.options.body(prompt) for prompt in self.prompts)
        for load in self.plan.loads:
            if self.interrupted:
                return
            await self._run_level(load, bodies)

    def interrupt(self) -> None:
        """End the level that runs and leave out the others."""
        self.interrupted = True
        if self._level is not None:
            self._level.interrupt()

    async def _run_level(self, load: Load, bodies: Iterator[bytes]) -> None:
        level = Level(self.client, self.plan.options.api, bodies, load, limit_of(load, self.plan.limit))
        self._level = level
        with self.watch(level) as on_end:
            level.on_end = on_end
            await level.run()
        self.summaries.append(summarise(level))

    async def _warm_up(self) -> None:
        """With prompts of its own, so that nobody finds the level's own in a cache."""
        for prompt in itertools.islice(synthetic(seed=time.time_ns()), self.plan.warm_up):
            if self.interrupted:
                return
            record = RequestRecord(time.perf_counter())
            body = self.plan.options.body(Prompt(prompt.messages, _WARM_UP_TOKENS))
            await ask(self.client, self.plan.options.api, body, record)
            if record.error is not None:
                raise ServerError(f"The warm-up failed: {record.error}", status=record.status)
