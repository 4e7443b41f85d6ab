"""What logs and traces are told; crosses to the engine's process with its other settings.

Knows nothing about where the values come from.
"""

from typing import Literal

import msgspec

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which lines are written, how, and where."""

    level: LogLevel = "info"
    format: LogFormat = "auto"
    """auto: for people where they go to a terminal, else JSON."""
    file: str | None = None
    """Lines are added to its end; None: stderr."""
