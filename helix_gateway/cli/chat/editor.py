"""The line that the user types on: editing keys, history, several lines.  Knows nothing about what is typed."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings

if TYPE_CHECKING:
    from prompt_toolkit.buffer import Buffer
    from prompt_toolkit.key_binding import KeyPressEvent

_QUOTES = '"""'


def open_editor(commands: tuple[str, ...]) -> "PromptSession[str]":
    """An editor that remembers what was typed in earlier sessions.

    Args:
        commands: completed with Tab.
    """
    return PromptSession(
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        history=_history(),
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
    )


def cleaned(typed: str) -> str:
    """What was meant: without space around it, and without the quotes that held several lines together."""
    text = typed.strip()
    if text.startswith(_QUOTES):
        text = text.removeprefix(_QUOTES).removesuffix(_QUOTES).strip()
    return text


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: "KeyPressEvent") -> None:
        _send_or_go_on(event.current_buffer)

    @keys.add("escape", "enter")
    def _new_line(event: "KeyPressEvent") -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _send_or_go_on(buffer: "Buffer") -> None:
    text = buffer.text.strip()
    if text.startswith(_QUOTES) and (len(text) < 2 * len(_QUOTES) or not text.endswith(_QUOTES)):
        buffer.newline(copy_margin=False)
    elif buffer.document.text_before_cursor.endswith("\\"):
        buffer.delete_before_cursor()
        buffer.newline(copy_margin=False)
    else:
        buffer.validate_and_handle()


def _history() -> History:
    """Kept for this user alone, as a shell's; in memory only where it cannot be written."""
    import platformdirs

    path = Path(platformdirs.user_state_path("helix", appauthor=False)) / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        usable = os.access(path, os.R_OK | os.W_OK)
    except OSError:
        usable = False
    return FileHistory(str(path)) if usable else InMemoryHistory()
