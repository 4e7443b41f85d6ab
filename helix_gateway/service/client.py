"""What every `ModelService` has in common: calls become commands, events become text.

Where the engine runs, and how commands get there, is the subclass's affair.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from helix_gateway.core.errors import EngineUnavailableError, HelixError
from helix_gateway.core.event import TokenEvent
from helix_gateway.core.stats import EngineStats
from helix_gateway.service.api import GenerationCall, ServiceState
from helix_gateway.service.backlog import Backlog, limit_bytes
from helix_gateway.service.engine_stream import EngineStream
from helix_gateway.service.messages import (
    Alive,
    Cancel,
    Command,
    Events,
    Invalid,
    LoadFailed,
    NotTaken,
    PromptTooLong,
    QueueFull,
    Ready,
    Reply,
    Submit,
)
from helix_gateway.service.observer import EngineObserver
from helix_gateway.service.requests_in_flight import RequestsInFlight, Sink
from helix_gateway.service.seeds import SEED_BITS, seed_source
from helix_gateway.service.settings import EngineSettings
from helix_gateway.telemetry.metrics import Metrics
from helix_gateway.text.tokenizer import Tokenizer

_UNAVAILABLE: dict[ServiceState, str] = {
    "starting": "The model is still being loaded; try again in a moment.",
    "ready": "The engine is not quite ready; try again in a moment.",
    "restarting": "The engine is being restarted; try again in a moment.",
    "stopped": "The engine has stopped and will not come back.",
}


class EngineClient(ABC):
    """A `service.api.ModelService` over an engine that takes commands and answers with replies.

    Args:
        settings: the engine's.
        tokenizer: the model's.
        observer: keeps the figures; None where nobody will ask for them.
    """

    def __init__(self, settings: EngineSettings, tokenizer: Tokenizer, observer: EngineObserver | None = None) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._observer = observer or EngineObserver(Metrics(), settings.model_path)
        self._in_flight = RequestsInFlight()
        self._seeds = seed_source(settings.seed)
        self._state: ServiceState = "starting"
        self._ready: Ready | None = None

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Pass a command on, without waiting.  What cannot be passed on because the engine is gone is dropped."""

    @abstractmethod
    def _sink(self, backlog: Backlog) -> Sink:
        """A sink that fills a backlog of the running event loop, from wherever this service gets its replies."""

    @property
    def tokenizer(self) -> Tokenizer:
        """See `ModelService`."""
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        """See `ModelService`.  Raises EngineUnavailableError before the engine has first been ready."""
        return self._facts().max_model_len

    @property
    def vocab_size(self) -> int:
        """See `ModelService`.  Raises EngineUnavailableError before the engine has first been ready."""
        return self._facts().vocab_size

    @property
    def max_sequences(self) -> int:
        """See `ModelService`."""
        return self._settings.max_num_seqs + self._settings.max_queue_len

    @property
    def state(self) -> ServiceState:
        """See `ModelService`."""
        return self._state

    def draw_seed(self) -> int:
        """See `ModelService`."""
        return self._seeds.getrandbits(SEED_BITS)

    def _facts(self) -> Ready:
        if self._ready is None:
            raise EngineUnavailableError(_UNAVAILABLE[self._state])
        return self._ready

    def _refuse_unless_ready(self) -> None:
        if self._state != "ready":
            raise EngineUnavailableError(_UNAVAILABLE[self._state])

    def generate(self, call: GenerationCall) -> EngineStream:
        """See `ModelService`."""
        self._refuse_unless_ready()
        request_id = call.request.request_id

        def end(unfinished: int) -> None:
            self._in_flight.remove(request_id)
            if unfinished:
                self._send(Cancel(request_id))

        # A reader that never comes back does not get to the end of its stream: its engine is told at once.
        backlog = Backlog(lambda: limit_bytes(len(self._in_flight)), lambda: self._send(Cancel(request_id)))
        self._in_flight.add(request_id, self._sink(backlog))
        try:
            # Once more: an engine that has gone meanwhile has told everybody, but not this one.
            self._refuse_unless_ready()
            self._send(Submit(call))
        except BaseException:
            self._in_flight.remove(request_id)
            raise
        try:
            return EngineStream(call, self._tokenizer, backlog, self._lose, end)  # made while the engine is at work
        except BaseException:
            end(call.request.sampling.n)
            raise

    def _lose(self, error: HelixError, unfinished: int) -> None:
        if isinstance(error, EngineUnavailableError):
            self._observer.lose(unfinished)

    def _observe(self, events: Sequence[TokenEvent]) -> None:
        """Count what a step had to tell, which is being passed on."""
        self._observer.take_events(events)

    def _receive(self, reply: Reply) -> None:
        """Act on one reply of the engine."""
        match reply:
            case Events(events=events):
                self._in_flight.deliver(events)
                self._observe(events)
            case EngineStats():
                self._observer.take_stats(reply)
            case PromptTooLong() | QueueFull() | Invalid() | NotTaken():
                self._in_flight.refuse(reply)
            case Ready():
                self._observer.engine_ready()
                self._ready = reply
                self._state = "ready"
            case LoadFailed() | Alive():
                pass
