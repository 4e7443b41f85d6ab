"""One request as it is answered: the engine's events become text, and whoever stops reading ends the request.

Knows nothing about how commands reach the engine nor how events come back: it is given a backlog that fills, and is told
what to do once nobody reads on.
"""

from collections.abc import AsyncIterator, Callable

from helix_gateway.core.errors import HelixError
from helix_gateway.service.api import GenerationCall, TextDelta
from helix_gateway.service.backlog import Backlog
from helix_gateway.service.stops import ChoiceText
from helix_gateway.text.tokenizer import Tokenizer

End = Callable[[int], None]
"""Told once, when the request is over on this side: how many choices had not come to their end."""


class EngineStream(AsyncIterator[TextDelta]):
    """The deltas of all choices of a request that the engine has been asked.

    Args:
        call: what it was asked.
        tokenizer: the model's.
        backlog: where its events come.
        fail: told how many choices an error of the engine's has ended.
        end: see `End`.
    """

    def __init__(
        self,
        call: GenerationCall,
        tokenizer: Tokenizer,
        backlog: Backlog,
        fail: Callable[[HelixError, int], None],
        end: End,
    ) -> None:
        self._backlog = backlog
        self._fail = fail
        self._end: End | None = end
        self._unfinished = call.request.sampling.n
        self._texts = [ChoiceText(tokenizer, call) for _ in range(self._unfinished)]

    async def __anext__(self) -> TextDelta:
        """The next delta.

        Raises:
            HelixError: the engine refused the request, or is gone.
        """
        if self._end is None:
            raise StopAsyncIteration
        try:
            event = await self._backlog.get()
        except HelixError as error:
            self._fail(error, self._unfinished)
            self._unfinished = 0
            self._close()
            raise
        except BaseException:  # whoever waited was cancelled
            self._close()
            raise
        if event.finish_reason is not None:
            self._unfinished -= 1
            if not self._unfinished:
                self._close()
        return self._texts[event.index].take(event)

    async def aclose(self) -> None:
        """End the request, if it has not ended; may be called twice."""
        self._close()

    def _close(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end(self._unfinished)
