"""Ctrl-C as a call on the event loop, for commands that end something of theirs rather than themselves.

Knows nothing about what is ended.  Works where loops take no signal handlers (Windows) just as well.
"""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def on_interrupt(act: Callable[[], object]) -> Iterator[None]:
    """Inside, Ctrl-C calls ``act`` on the running loop and does nothing else; a second one is as usual.

    Must be entered on the main thread, which is where Python hears of signals.
    """
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGINT)

    def heard(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        loop.call_soon_threadsafe(act)

    signal.signal(signal.SIGINT, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
