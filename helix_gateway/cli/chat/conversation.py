"""What has been said, how the next answer is asked for, and the slash commands that change either.

Knows nothing about terminals nor about servers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from helix_gateway.core.errors import HelixError


class Leave(Exception):
    """The user wants to go."""


@dataclass(slots=True)
class Conversation:
    """Messages so far, and the settings of the next answer."""

    system: str | None = None
    temperature: float | None = None
    """None: the server's own."""
    max_tokens: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    """Turns of user and assistant; the system prompt comes before them when they are sent."""

    def all_messages(self) -> list[dict[str, str]]:
        """The system prompt, where there is one, and all turns."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def ask(self, text: str) -> None:
        """Add what the user says."""
        self.messages.append({"role": "user", "content": text})

    def close_turn(self, answer: str) -> None:
        """Add the answer, however far it came; a question that got none is forgotten."""
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        elif self.messages:
            self.messages.pop()

    def body(self, model: str) -> bytes:
        """The JSON of a streamed request for the next answer."""
        fields: dict[str, Any] = {
            "model": model,
            "messages": self.all_messages(),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        optional = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return msgspec.json.encode(fields | {name: value for name, value in optional.items() if value is not None})


def obey(conversation: Conversation, line: str) -> str:
    """Carry out a line that begins with a slash, and return what to tell the user.

    Raises:
        Leave: the user wants to go.
        HelixError: there is no such command, or it cannot be done; the message is one line.
    """
    name, _, argument = line.partition(" ")
    command = _COMMANDS.get(name)
    if command is None:
        raise HelixError(f"There is no command {name}; /help lists those there are.")
    return command(conversation, argument.strip())


def _help(_conversation: Conversation, _argument: str) -> str:
    return HELP


def _system(conversation: Conversation, argument: str) -> str:
    if argument:
        conversation.system = argument
        return "The system prompt is set; it holds from the next answer on."
    return conversation.system or "There is no system prompt; /system TEXT sets one."


def _clear(conversation: Conversation, _argument: str) -> str:
    conversation.messages.clear()
    return "The conversation is forgotten" + ("; the system prompt stays." if conversation.system else ".")


def _temperature(conversation: Conversation, argument: str) -> str:
    if argument:
        conversation.temperature = _temperature_of(argument)
    if conversation.temperature is None:
        return "The server chooses the temperature; /temperature 0.7 sets one."
    return f"The temperature is {conversation.temperature:g}."


def _temperature_of(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise HelixError(f"{text} is no temperature; give a number from 0 to 2.")
    return value


def _save(conversation: Conversation, argument: str) -> str:
    if not argument:
        raise HelixError("Name a file: /save talk.md for reading, /save talk.json for programs.")
    path = Path(argument).expanduser()
    as_json = path.suffix.lower() == ".json"
    text = json.dumps(conversation.all_messages(), indent=1, ensure_ascii=False) if as_json else _prose(conversation)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise HelixError(f"Cannot write {path}: {error.strerror}.") from error
    return f"Saved to {path}."


def _prose(conversation: Conversation) -> str:
    return "\n\n".join(f"**{message['role']}**\n\n{message['content']}" for message in conversation.all_messages())


def _quit(_conversation: Conversation, _argument: str) -> str:
    raise Leave


_COMMANDS: dict[str, Callable[[Conversation, str], str]] = {
    "/help": _help,
    "/system": _system,
    "/clear": _clear,
    "/temperature": _temperature,
    "/save": _save,
    "/quit": _quit,
    "/exit": _quit,
}

NAMES = tuple(_COMMANDS)

HELP = """\
/system TEXT         set the system prompt; without TEXT, show it
/clear               forget the conversation
/temperature NUMBER  0 (always the likeliest) to 2; without NUMBER, show it
/save FILE           write the conversation, as JSON where FILE ends with .json
/quit                leave, as Ctrl-D does
Enter sends, Alt-Enter begins a new line; so does Enter after a backslash, and inside \"\"\"three quotes\"\"\".
Ctrl-C stops an answer; where none is running, it leaves."""
