"""Commands and replies as bytes on a socket between two processes of one user.

On Unix the socket is a file in a folder that only this user may enter; where there are no such sockets, a loopback
port.  One PUSH to one PULL in each direction.
"""

import sys
import tempfile
from pathlib import Path

import msgspec

from helix_gateway.service.messages import Command, Reply

command_encoder = msgspec.msgpack.Encoder()
command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
reply_encoder = msgspec.msgpack.Encoder()
reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


class Endpoints:
    """Two addresses to bind, one for each direction, and the folder behind them."""

    def __init__(self) -> None:
        self._folder = None if sys.platform == "win32" else tempfile.TemporaryDirectory(prefix="helix-")
        self.commands = self._address("commands")
        self.replies = self._address("replies")

    def _address(self, name: str) -> str:
        return "tcp://127.0.0.1:*" if self._folder is None else f"ipc://{Path(self._folder.name) / name}"

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            self._folder.cleanup()
