"""What the engine tells of a sequence: after a step that gave it something, and at its end.

Knows nothing about who listens.
"""

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.core.event import ErrorKind, FinishReason, TokenEvent
from helix_gateway.core.stats import StepSeconds
from helix_gateway.engine.ending import Ending
from helix_gateway.engine.plan import SequenceOutput
from helix_gateway.engine.sequence import Sequence


def step_event(sequence: Sequence, output: SequenceOutput, ending: Ending, steps: StepSeconds) -> TokenEvent:
    """What a step had to tell of one sequence.

    Args:
        steps: what the engine's steps have taken until now.
    """
    first_event = len(ending.token_ids) == sequence.num_output_tokens
    return TokenEvent(
        request_id=sequence.request.request_id,
        index=sequence.index,
        token_ids=ending.token_ids,
        logprobs=None if output.logprobs is None else output.logprobs[: len(ending.token_ids)],
        prompt_logprobs=sequence.prompt_logprobs if first_event and sequence.wants_prompt_logprobs else None,
        finish_reason=ending.finish_reason,
        stop_reason=ending.stop_reason,
        start=sequence.start() if first_event and ending.token_ids else None,
        metrics=sequence.metrics(steps) if ending.finish_reason else None,
    )


def end_event(
    sequence: Sequence,
    reason: FinishReason,
    steps: StepSeconds,
    message: str | None = None,
    kind: ErrorKind | None = None,
) -> TokenEvent:
    """That a sequence was ended from outside or failed; ``steps`` as for `step_event`."""
    return TokenEvent(
        request_id=sequence.request.request_id,
        index=sequence.index,
        token_ids=[],
        finish_reason=reason,
        error=message,
        error_kind=kind,
        metrics=sequence.metrics(steps),
    )


def explained(error: Exception) -> tuple[str, ErrorKind]:
    """What a client is told of a fault, in one line."""
    if not isinstance(error, OutOfMemoryError | MemoryError):
        return f"The engine failed while computing this request: {type(error).__name__}.", "failed"
    reason = str(error).partition("\n")[0] or type(error).__name__
    message = f"Out of memory: the device has no room for this request ({reason}). Shorten it, or try again later."
    return message, "out_of_memory"
