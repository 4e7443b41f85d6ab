"""Refuses text that is not Unicode text: JSON can spell half of a surrogate pair, UTF-8 and tokenizers cannot."""

from helix_gateway.core.errors import InvalidRequestError


def check_encodable(text: str, *, param: str | None = None) -> None:
    r"""Refuse a text that is not Unicode text, with its place; ``param`` is its JSON path.

    Raises:
        InvalidRequestError: the text holds a lone surrogate (JSON's ``\ud800``).
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"The text holds half of a surrogate pair (U+{ord(text[error.start]):04X}, at character {error.start}), "
            "which is no character; send well-formed Unicode.",
            param=param,
        ) from error
