"""What a look at a machine found: each thing with how it stands, and what to do where it is not well.

Knows nothing about who looks, nor about how it is shown.
"""

from typing import Literal

import msgspec

State = Literal["ok", "warning", "problem"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    name: str
    state: State
    said: str
    """What was found, in one line."""
    advice: str | None = None
    """What to do, in one line, where the state is not ``ok``."""
