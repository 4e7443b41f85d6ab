"""What crosses between whoever wants tokens and the loop that makes them: commands one way, replies the other.

Plain data that msgspec can write; the same objects serve a thread's queue and another process's socket.
"""

from typing import TypeAlias

import msgspec

from helix_gateway.core.event import TokenEvent
from helix_gateway.core.stats import EngineStats
from helix_gateway.service.api import GenerationCall


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Take a request."""

    call: GenerationCall


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request; its events stop, its blocks come back."""

    request_id: str


Command: TypeAlias = Submit | Cancel


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded and warm; requests are served from now on."""

    max_model_len: int
    vocab_size: int


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The model cannot be loaded; the loop ends."""

    message: str


class Events(msgspec.Struct, frozen=True, tag=True):
    """What a step had to tell."""

    events: list[TokenEvent]


class PromptTooLong(msgspec.Struct, frozen=True, tag=True):
    """A request was not taken: its prompt leaves no room for an answer."""

    request_id: str
    prompt_tokens: int
    max_model_len: int


class QueueFull(msgspec.Struct, frozen=True, tag=True):
    """A request was not taken: too many wait already."""

    request_id: str
    message: str
    retry_after_s: float


class Invalid(msgspec.Struct, frozen=True, tag=True):
    """A request was not taken: it asks for what this model cannot do."""

    request_id: str
    message: str


class NotTaken(msgspec.Struct, frozen=True, tag=True):
    """A request was not taken, through no fault of its own."""

    request_id: str
    message: str


Refused: TypeAlias = PromptTooLong | QueueFull | Invalid | NotTaken


class Alive(msgspec.Struct, frozen=True, tag=True):
    """The loop is turning: sent when nothing else was for a while."""


Reply: TypeAlias = Ready | LoadFailed | Events | Refused | Alive | EngineStats
