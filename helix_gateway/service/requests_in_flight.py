"""Who waits for which request's events, on the side of whoever asked.

Knows nothing about how replies arrive; safe to use from several threads.
"""

import threading
from collections.abc import Callable, Iterable

from helix_gateway.core.errors import (
    ContextLengthError,
    EngineUnavailableError,
    HelixError,
    InvalidRequestError,
    QueueFullError,
)
from helix_gateway.core.event import TokenEvent
from helix_gateway.service.messages import Invalid, NotTaken, PromptTooLong, QueueFull, Refused

Sink = Callable[[TokenEvent | HelixError], None]
"""Takes what happens to one request; must not block."""


class RequestsInFlight:
    """Request ids to sinks."""

    def __init__(self) -> None:
        self._sinks: dict[str, Sink] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sinks)

    def add(self, request_id: str, sink: Sink) -> None:
        """Let a sink hear of a request.

        Raises:
            InvalidRequestError: a request of that id is in flight already.
        """
        with self._lock:
            if request_id in self._sinks:
                raise InvalidRequestError(f"A request with the id {request_id} is already being served.")
            self._sinks[request_id] = sink

    def remove(self, request_id: str) -> None:
        """Let nobody hear of it any more."""
        with self._lock:
            self._sinks.pop(request_id, None)

    def deliver(self, events: Iterable[TokenEvent]) -> None:
        """Pass a step's events on, a sequence's first tokens before what others go on with.

        Events of requests that nobody waits for any more are dropped.
        """
        for event in sorted(events, key=_goes_on):
            sink = self._sinks.get(event.request_id)
            if sink is not None:
                sink(event)

    def refuse(self, refused: Refused) -> None:
        """Tell a request that it was not taken."""
        sink = self._sinks.get(refused.request_id)
        if sink is not None:
            sink(_as_error(refused))

    def fail_all(self, message: str) -> None:
        """Tell every request that its engine is gone."""
        with self._lock:
            sinks = list(self._sinks.values())
        for sink in sinks:
            sink(EngineUnavailableError(message))


def _goes_on(event: TokenEvent) -> bool:
    return event.start is None


def _as_error(refused: Refused) -> HelixError:
    match refused:
        case PromptTooLong(prompt_tokens=prompt_tokens, max_model_len=max_model_len):
            return ContextLengthError(prompt_tokens, max_model_len)
        case QueueFull(message=message, retry_after_s=retry_after_s):
            return QueueFullError(message, retry_after_s=retry_after_s)
        case Invalid(message=message):
            return InvalidRequestError(message)
        case NotTaken(message=message):
            return HelixError(message)
