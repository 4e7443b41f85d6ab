"""Stop strings on both sides of the engine: the condition that ends a sequence there, and the text that leaves here.

Both read the same text, made by the same kind of detokenizer from the same tokens, so they agree on where it ends
without telling each other.  Text of the first ``min_tokens`` tokens is not searched.
"""

from collections.abc import Sequence

from helix_gateway.core.event import TokenEvent
from helix_gateway.core.protocols import StopCondition
from helix_gateway.service.api import GenerationCall, TextDelta
from helix_gateway.text.detokenizer import Detokenizer
from helix_gateway.text.stop_strings import StopStringCondition, StopStringFilter
from helix_gateway.text.tokenizer import Tokenizer


def stop_condition(tokenizer: Tokenizer, call: GenerationCall) -> StopCondition | None:
    """The engine's side: None where the call has no stop strings, so that nothing is detokenised there."""
    if not call.stop.strings:
        return None
    detokenizer = _detokenizer(tokenizer, call)
    return StopStringCondition(call.stop.strings, _ExemptDetokenizer(detokenizer, call.request.sampling.min_tokens))


def _detokenizer(tokenizer: Tokenizer, call: GenerationCall) -> Detokenizer:
    return tokenizer.detokenizer(skip_special_tokens=call.stop.skip_special_tokens, after=call.request.prompt_token_ids)


class _ExemptDetokenizer:
    """The text of a sequence, less that of its first tokens (`text.detokenizer.Detokenizer`)."""

    def __init__(self, detokenizer: Detokenizer, num_exempt: int) -> None:
        self._detokenizer = detokenizer
        self._num_exempt = num_exempt

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text of those tokens that are not exempt."""
        exempt, rest = token_ids[: self._num_exempt], token_ids[self._num_exempt :]
        self._num_exempt -= len(exempt)
        self._detokenizer.feed(exempt)
        return self._detokenizer.feed(rest)

    def flush(self) -> str:
        """The text still held back."""
        return self._detokenizer.flush()


class ChoiceText:
    """The client's side: one choice's events as text that nothing can take back."""

    def __init__(self, tokenizer: Tokenizer, call: GenerationCall) -> None:
        self._detokenizer = _detokenizer(tokenizer, call)
        self._filter = (
            StopStringFilter(call.stop.strings, include_in_output=call.stop.include_in_output)
            if call.stop.strings
            else None
        )
        self._num_exempt = call.request.sampling.min_tokens

    def take(self, event: TokenEvent) -> TextDelta:
        """The next delta; with the choice's last event, all that was held back."""
        text = self._feed(event.token_ids)
        if event.finish_reason is not None:
            text += self._rest()
        return TextDelta(
            index=event.index,
            text=text,
            token_ids=event.token_ids,
            logprobs=event.logprobs,
            prompt_logprobs=event.prompt_logprobs,
            finish_reason=event.finish_reason,
            stop_reason=event.stop_reason,
            error=event.error,
            error_kind=event.error_kind,
            metrics=event.metrics,
        )

    def _feed(self, token_ids: list[int]) -> str:
        if self._filter is None:
            return self._detokenizer.feed(token_ids)
        exempt, rest = token_ids[: self._num_exempt], token_ids[self._num_exempt :]
        self._num_exempt -= len(exempt)
        return self._detokenizer.feed(exempt) + self._filter.feed(self._detokenizer.feed(rest))

    def _rest(self) -> str:
        if self._filter is None:
            return self._detokenizer.flush()
        # The last half-character can complete a stop string of U+FFFD only here, where nobody stops any more.
        return self._filter.feed(self._detokenizer.flush()) + self._filter.flush()
