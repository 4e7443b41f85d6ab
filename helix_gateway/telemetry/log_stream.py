"""Where log lines go: stderr or a file, and what happens when it takes no more of them.

A line that cannot be written (the disk is full, whoever read the pipe is gone) is lost, and nothing else: no request
fails for it.  Once lines get through again, the first of them says how many are missing.
"""

import os
import sys
from collections.abc import Callable
from typing import TextIO


class LogStream:
    """What loggers write to.

    Args:
        write: takes one or several whole lines.
        is_terminal: whether a person reads it.
    """

    def __init__(self, write: Callable[[str], object], *, is_terminal: bool) -> None:
        self._write = write
        self.is_terminal = is_terminal
        self.lost = 0
        """Lines that could not be written since the last one that could."""

    def write(self, text: str) -> None:
        """Write whole lines, or lose them."""
        try:
            self._write(text)
        except (OSError, ValueError):  # ValueError: it was closed
            self.lost += 1
        else:
            self.lost = 0

    def flush(self) -> None:
        """Nothing is held back."""


def to_stream(stream: TextIO) -> LogStream:
    """Lines to a stream that is open already, such as stderr."""

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return LogStream(write, is_terminal=stream.isatty())


def to_stderr() -> LogStream:
    """Lines to this process's stderr."""
    return to_stream(sys.stderr)


def to_file(path: str, opening: str) -> LogStream:
    """Lines to the end of a file; several processes may share it.

    Args:
        opening: a line to write at once, by which it is known that the file can be written.

    Raises:
        OSError: it cannot; the message is one clear line.
    """
    file = None
    try:
        # Without a buffer, each line is one write to the end, and what could not be written is not kept.
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        os.write(file, opening.encode())
    except OSError as error:
        if file is not None:
            os.close(file)
        raise OSError(f"The log file {path} cannot be written: {error.strerror}; see --log-file.") from error
    return LogStream(lambda text: os.write(file, text.encode(errors="backslashreplace")), is_terminal=False)
