"""What can go wrong, as types; each room raises these and the gateway alone turns them into OpenAI's JSON.

Knows nothing about HTTP statuses: the gateway maps a class to a status in one place.
"""


class HelixError(Exception):
    """Base of every error that Helix raises on purpose; its message is one clear line for a person."""


class InvalidRequestError(HelixError):
    """The request cannot be served as asked; nothing was spent on it.

    Args:
        message: what is wrong, the bound, and what to do.
        param: JSON path of the offending field (``messages[0].content``), where there is one.
        code: OpenAI's machine-readable code, where there is one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(InvalidRequestError):
    """The prompt alone does not fit the context window (code ``context_length_exceeded``)."""

    def __init__(self, prompt_tokens: int, max_model_len: int, *, param: str | None = None) -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has "
            f"{prompt_tokens} tokens and at least one more is needed for the answer. Shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )
        self.prompt_tokens = prompt_tokens
        self.max_model_len = max_model_len


class QueueFullError(HelixError):
    """The waiting queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailableError(HelixError):
    """The engine died, is restarting, or is still loading."""


class SlowReaderError(HelixError):
    """An answer was cut off because more than ``limit_bytes`` of it waited for somebody to read them."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"The answer was cut off because it was read too slowly: more than {limit_bytes // 1024:,} KiB of it were "
            "waiting. Read faster, or ask for fewer tokens, choices or logprobs."
        )
        self.limit_bytes = limit_bytes


class OutOfMemoryError(HelixError):
    """The device or the KV pool cannot hold what was asked, even alone."""


class ModelLoadError(HelixError):
    """The model is missing, corrupt, or of a kind that Helix does not serve; the message names it."""


class DraftVocabularyError(ModelLoadError):
    """The draft model's tokenizer cannot be translated to the target's and back; the message says why."""
