"""The loop that turns an engine: take commands, compute a step, tell, again; asleep when there is nothing to do.

The same loop runs in a thread of this process and in a process of its own: it is given an `Inbox` to read and a
function to tell.  Knows nothing about queues, sockets or text.
"""

from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from helix_gateway.service.messages import Alive, Command, Events, Reply, Submit

if TYPE_CHECKING:
    from helix_gateway.service.host import EngineHost

ALIVE_INTERVAL_S = 1.0
"""A loop that has told nothing for this long says that it is alive."""


class Closed(Exception):
    """Nobody will send commands any more."""


class Inbox(Protocol):
    """Where commands come from."""

    def receive(self, timeout_s: float) -> list[Command]:
        """All commands there are, waiting up to ``timeout_s`` for the first.  Raises Closed at the end."""


Tell = Callable[[Reply], None]

STATS_INTERVAL_S = 0.5
"""Between two reports of a busy engine's figures."""


def run_loop(host: "EngineHost", inbox: Inbox, tell: Tell, *, batch_window_s: float = 0.0) -> None:
    """Turn the engine until the inbox is closed.

    Args:
        batch_window_s: how long an idle engine waits after a request for company before its first step.
    """
    last_told = last_stats = monotonic()
    tell(host.engine.stats())
    with suppress(Closed):
        while True:
            idle = not host.has_work
            commands = inbox.receive(ALIVE_INTERVAL_S if idle else 0.0)
            if idle and not commands:
                host.check_accounts()
            host.join_drafter()
            _obey(host, commands, tell)
            if idle and host.has_work and batch_window_s:
                _gather(host, inbox, tell, until=monotonic() + batch_window_s)
            events = host.step() if host.has_work else []
            if monotonic() - last_stats > STATS_INTERVAL_S or (events and not host.has_work):
                # Before the events: whoever has an answer finds it counted.
                tell(host.engine.stats())
                last_stats = monotonic()
            if events:
                tell(Events(events))
            elif monotonic() - last_told > ALIVE_INTERVAL_S:
                tell(Alive())
            else:
                continue
            last_told = monotonic()


def _gather(host: "EngineHost", inbox: Inbox, tell: Tell, *, until: float) -> None:
    while (left := until - monotonic()) > 0:
        _obey(host, inbox.receive(left), tell)


def _obey(host: "EngineHost", commands: list[Command], tell: Tell) -> None:
    for command in commands:
        if isinstance(command, Submit):
            refused = host.submit(command.call)
            if refused is not None:
                tell(refused)
        else:
            host.cancel(command.request_id)
