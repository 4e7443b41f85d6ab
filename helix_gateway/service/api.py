"""What the gateway asks of an engine, wherever that runs: text in and out on this side, tokens beyond it.

`ModelService` is a Protocol: `service/` has one over an engine process and one over an engine in this process,
and the gateway's tests have a fake.  Knows nothing about HTTP.
"""

from collections.abc import AsyncIterator
from typing import Literal, Protocol

import msgspec

from helix_gateway.core.event import ErrorKind, FinishReason, SequenceMetrics, TokenLogprobs
from helix_gateway.core.request import Request
from helix_gateway.text.tokenizer import Tokenizer


class StopStrings(msgspec.Struct, frozen=True, kw_only=True):
    """Strings that end an answer, and how its text is made from tokens."""

    strings: tuple[str, ...] = ()
    include_in_output: bool = False
    skip_special_tokens: bool = True


class GenerationCall(msgspec.Struct, frozen=True, kw_only=True):
    """One Request with what only text/ understands of it."""

    request: Request
    stop: StopStrings = StopStrings()


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of one choice: text that no stop string can take back any more, and the tokens behind it.

    Text may lag behind tokens (half a character, the start of a stop string) and comes with a later delta; the
    delta with a ``finish_reason`` carries all that is left and is the last of its choice.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_kind: ErrorKind | None = None
    metrics: SequenceMetrics | None = None


ServiceState = Literal["starting", "ready", "restarting", "stopped"]


class ModelService(Protocol):
    """One served model."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Encodes prompts, renders chat templates, decodes single tokens; thread-safe."""

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together; known once the state has been "ready"."""

    @property
    def vocab_size(self) -> int:
        """Ids below this may stand in prompts and logit_bias."""

    @property
    def max_sequences(self) -> int:
        """Sequences that an idle engine takes, running and waiting; a request of more is never served."""

    @property
    def state(self) -> ServiceState:
        """Whether a call would be served now."""

    def generate(self, call: GenerationCall) -> AsyncIterator[TextDelta]:
        """Ask the engine, and stream the deltas of all choices until each has finished.

        Closing the iterator (or cancelling the task that reads it) aborts the request and frees its blocks; whoever has
        called this closes it, read or not.

        Raises:
            QueueFullError, EngineUnavailableError: before the first delta.
            EngineUnavailableError: also later, when the engine dies under the request.
        """

    def draw_seed(self) -> int:
        """A seed for a request that brought none: unsigned, and small enough for any client to send back."""
