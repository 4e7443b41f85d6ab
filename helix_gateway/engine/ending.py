"""Where verified tokens end a sequence: stop tokens, lengths, and what its stop condition says.

Stop tokens are looked for before anything is appended.  Knows nothing about text or blocks.
"""

from typing import NamedTuple

from helix_gateway.core.event import FinishReason
from helix_gateway.engine.sequence import Sequence


class Ending(NamedTuple):
    """Which of the tokens just verified belong to the sequence, and whether it ends with them."""

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


def find_ending(sequence: Sequence, token_ids: list[int], max_model_len: int) -> Ending:
    """Hold a step's tokens against everything that could end the sequence; feeds its stop condition."""
    if not token_ids:  # a chunk that did not reach the end of what is known
        return Ending([])
    ending = _by_length(sequence, _by_stop_token(sequence, token_ids), max_model_len)
    if sequence.stop is None or not ending.token_ids:
        return ending
    match = sequence.stop.feed(ending.token_ids)
    return ending if match is None else Ending(ending.token_ids[: match.num_tokens], "stop", match.reason)


def _by_stop_token(sequence: Sequence, token_ids: list[int]) -> Ending:
    if sequence.stop_ids.isdisjoint(token_ids):
        return Ending(token_ids)
    for count, token in enumerate(token_ids):
        if token in sequence.stop_ids:
            asked_for = token in sequence.request.sampling.stop_token_ids
            return Ending(token_ids[:count], "stop", token if asked_for else None)
    return Ending(token_ids)


def _by_length(sequence: Sequence, ending: Ending, max_model_len: int) -> Ending:
    end, max_tokens = max_model_len, sequence.request.sampling.max_tokens
    if max_tokens is not None:
        end = min(end, sequence.num_prompt_tokens + max_tokens)
    left = end - len(sequence.token_ids)
    if len(ending.token_ids) < left or (len(ending.token_ids) == left and ending.finish_reason):
        return ending
    return Ending(ending.token_ids[:left], "length")
