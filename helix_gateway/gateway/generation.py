"""One HTTP request's answers, as one stream: all prompts and choices interleaved.

Knows nothing about how answers are written.  Streams that nobody began to read are closed by `exchange.py`.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

from helix_gateway.core.errors import EngineUnavailableError, OutOfMemoryError
from helix_gateway.core.event import SequenceMetrics, TokenLogprobs
from helix_gateway.gateway.errors import GenerationFailedError
from helix_gateway.service.api import TextDelta

T = TypeVar("T")

Deltas = AsyncIterator[tuple[int, TextDelta]]
"""(choice, delta); choice = prompt index * choices a prompt + index."""

INTERLEAVE_BUFFER = 64
"""Deltas of several prompts that wait for a client that reads slowly; then their generators wait too."""


class closing(Generic[T]):  # noqa: N801 - as contextlib's `aclosing`
    """Close ``stream`` on the way out, if it is of a kind that can be."""

    def __init__(self, stream: AsyncIterator[T]) -> None:
        self.stream = stream

    async def __aenter__(self) -> AsyncIterator[T]:
        return self.stream

    async def __aexit__(self, *_: object) -> None:
        await close(self.stream)


async def close(stream: AsyncIterator[Any]) -> None:
    """End ``stream``, if it is of a kind that can be closed."""
    aclose = getattr(stream, "aclose", None)
    if aclose is not None:
        await aclose()


class Merged(AsyncIterator[tuple[int, TextDelta]]):
    """All deltas of all choices, in the order in which they come; there is a stream for each prompt.

    Every chunk of a stream passes through here: a generator more would cost each of them a frame.
    """

    def __init__(self, streams: Sequence[AsyncIterator[TextDelta]], num_choices: int) -> None:
        self._unfinished = len(streams) * num_choices
        self._source = streams[0] if len(streams) == 1 else _interleaved(streams, num_choices)

    async def __anext__(self) -> tuple[int, TextDelta]:
        """The next delta.

        Raises:
            QueueFullError, EngineUnavailableError: as the service does.
            GenerationFailedError: the engine gave up on a sequence.
        """
        try:
            delta = await self._source.__anext__()
        except StopAsyncIteration:
            if self._unfinished:
                raise EngineUnavailableError("The engine stopped before the answer was complete.") from None
            raise
        self._unfinished -= _is_last(delta)
        return delta.index, delta

    async def aclose(self) -> None:
        """End all streams."""
        await close(self._source)


async def _interleaved(
    streams: Sequence[AsyncIterator[TextDelta]], num_choices: int
) -> AsyncGenerator[TextDelta, None]:
    """The deltas of several prompts, their choices counted through all of them."""
    queue: asyncio.Queue[TextDelta | BaseException | None] = asyncio.Queue(INTERLEAVE_BUFFER)

    async def pump(prompt_index: int, stream: AsyncIterator[TextDelta]) -> None:
        try:
            async for delta in stream:
                await queue.put(msgspec.structs.replace(delta, index=prompt_index * num_choices + delta.index))
        except Exception as error:  # noqa: BLE001 - raised again where the queue is read
            await queue.put(error)
        else:
            await queue.put(None)

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    running = len(pumps)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _is_last(delta: TextDelta) -> bool:
    """Whether it ends its choice.

    Raises:
        OutOfMemoryError: the device's memory does not hold the request.
        GenerationFailedError: the engine gave up on the choice.
        EngineUnavailableError: the server is stopping.
    """
    if delta.finish_reason is None:
        return False
    if delta.error_kind == "out_of_memory":
        raise OutOfMemoryError(delta.error or "The device's memory does not hold this request.")
    if delta.finish_reason == "error":
        raise GenerationFailedError(delta.error or "The engine gave up on this answer.")
    if delta.finish_reason == "abort":
        raise EngineUnavailableError(delta.error or "The server is stopping; the answer was cut off.")
    return True


async def without_output(deltas: Deltas) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """Only what is known of the prompt: for ``echo`` with ``max_tokens: 0``, for which one token was generated."""
    async with closing(deltas) as source:
        async for choice, delta in source:
            finished = "length" if delta.finish_reason else None
            yield choice, msgspec.structs.replace(
                delta, text="", token_ids=[], logprobs=None, finish_reason=finished, stop_reason=None
            )


async def prompt_logprobs_first(deltas: Deltas, num_choices: int) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """The same deltas, but of each prompt the one that brings the prompt's logprobs comes before all others."""
    known: set[int] = set()
    held: dict[int, list[tuple[int, TextDelta]]] = {}
    async with closing(deltas) as source:
        async for choice, delta in source:
            prompt_index = choice // num_choices
            if prompt_index not in known and delta.prompt_logprobs is None:
                held.setdefault(prompt_index, []).append((choice, delta))
                continue
            yield choice, delta
            known.add(prompt_index)
            for item in held.pop(prompt_index, ()):
                yield item
    for items in held.values():
        for item in items:
            yield item


@dataclass(slots=True)
class Answer:
    """One choice, whole."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    metrics: SequenceMetrics | None = None
    """Known once it has ended."""

    def add(self, delta: TextDelta) -> None:
        """Take what is new."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason if delta.stop_reason is not None else self.stop_reason
        self.metrics = delta.metrics or self.metrics

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)

    @property
    def mean_logprob(self) -> float:
        """What `best_of` ranks by: log-probability a token."""
        return sum(token.logprob for token in self.logprobs) / max(1, len(self.logprobs))


def weight(part: TextDelta | Answer) -> int:
    """How much there is to write as JSON, in characters of text: a token id counts for one, a logprob for two."""
    size = len(part.token_ids)
    if part.logprobs is not None or part.prompt_logprobs is not None:
        size += logprobs_weight(part.logprobs) + logprobs_weight(part.prompt_logprobs)
    return size


def logprobs_weight(logprobs: Sequence[TokenLogprobs | None] | None) -> int:
    """The same of some logprobs alone; a prompt's first token has none, all others have equally many."""
    last = logprobs[-1] if logprobs else None
    return 0 if last is None or logprobs is None else 2 * len(logprobs) * (1 + len(last.top_ids))


async def gather_answers(deltas: Deltas, count: int) -> list[Answer]:
    """Wait for all choices."""
    answers = [Answer() for _ in range(count)]
    async with closing(deltas) as source:
        async for choice, delta in source:
            answers[choice].add(delta)
    return answers


def best_answers(answers: list[Answer], candidates: int, wanted: int) -> list[Answer]:
    """Of each prompt's ``candidates`` the ``wanted`` most likely ones, best first; all as they are if none are over."""
    if candidates == wanted:
        return answers
    groups = (answers[start : start + candidates] for start in range(0, len(answers), candidates))
    ranked = (sorted(group, key=lambda answer: answer.mean_logprob, reverse=True) for group in groups)
    return [answer for group in ranked for answer in group[:wanted]]
