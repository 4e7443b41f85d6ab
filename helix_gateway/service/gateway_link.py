"""The engine's end of the connection to its gateway: commands in, replies out, neither of which may hold a step up.

A reply is written by whoever tells it, for that wakes the gateway soonest; what the connection does not take at once,
since the gateway is busy or stopped, is written by a thread.  Knows nothing about what commands and replies mean.
"""

import selectors
import socket
import threading
from collections import deque

from helix_gateway.service.loop import Closed
from helix_gateway.service.messages import Command, Reply
from helix_gateway.service.wire import Frames, command_decoder, encoded, framed

_READ_BYTES = 64 * 1024
_LINGER_S = 1.0
"""How long an end waits for the last replies to be taken."""
_LOOK_UP_S = 0.2
"""How soon the thread notices that the link is closed while it waits for the gateway."""


class GatewayLink:
    """An `Inbox` and a `Tell` over one socket; told and read by one thread."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._readable, self._writable = selectors.DefaultSelector(), selectors.DefaultSelector()
        self._readable.register(connection, selectors.EVENT_READ)
        self._writable.register(connection, selectors.EVENT_WRITE)
        self._frames = Frames()
        self._unsent: deque[bytes] = deque()
        self._changed = threading.Condition()
        """Guards `_unsent` and `_closed`."""
        self._closed = False
        self._sender = threading.Thread(target=self._send_later, name="replies", daemon=True)
        self._sender.start()

    def receive(self, timeout_s: float) -> list[Command]:
        """See `Inbox`; of no timeout but an empty list means that nothing has come, or not all of a command."""
        commands = self._received()
        if not commands and timeout_s > 0.0 and self._readable.select(timeout_s):
            commands = self._received()
        return commands

    def tell(self, reply: Reply) -> None:
        """Pass a reply on, without waiting; it is dropped where nobody is left to read it."""
        with self._changed:
            for message in encoded(reply):
                data = framed(message)
                rest = data if self._unsent else data[self._sent(data) :]
                if rest:
                    self._unsent.append(rest)
                    self._changed.notify_all()

    def close(self) -> None:
        """Say that nothing more will come, once what was told is sent.  May be called twice."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unsent, _LINGER_S)
            self._closed = True
            self._changed.notify_all()
        self._sender.join()
        self._readable.close()
        self._writable.close()
        self._socket.close()

    def _received(self) -> list[Command]:
        """What has come.  Raises Closed once nothing will."""
        commands: list[Command] = []
        try:
            while data := self._socket.recv(_READ_BYTES):
                commands += map(command_decoder.decode, self._frames.take(data))
                if len(data) < _READ_BYTES:  # that was all
                    return commands
        except BlockingIOError:
            return commands
        except OSError as error:
            raise Closed from error
        raise Closed

    def _sent(self, data: bytes) -> int:
        """How many bytes the connection took."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # the gateway is gone; whoever reads next will notice
            return len(data)

    def _send_later(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unsent or self._closed)
                if self._closed:
                    return
            if self._writable.select(_LOOK_UP_S):
                self._send_next()

    def _send_next(self) -> None:
        with self._changed:
            data = self._unsent.popleft()
            if rest := data[self._sent(data) :]:
                self._unsent.appendleft(rest)
            self._changed.notify_all()
