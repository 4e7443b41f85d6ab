"""Text as clients send it, a string or an array of parts, and predictions made of it.

Images and audio are known by name and refused by name.  Knows nothing about conversations.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from helix_gateway.gateway.schemas.common import WireModel

MAX_PARTS = 16_384
TEXT_PARTS = ("text", "refusal")


class ContentPart(WireModel):
    """One part of a content; only text is taken."""

    type: str = Field(json_schema_extra={"enum": [*TEXT_PARTS]})
    text: str = ""
    """With the type `text`."""
    refusal: str = ""
    """With the type `refusal`."""

    @model_validator(mode="after")
    def _only_text(self) -> "ContentPart":
        if self.type not in TEXT_PARTS:
            raise PydanticCustomError(
                "part",
                "has the type `{part}`, which is not supported: send text, as `{text}`",
                {"part": self.type[:40], "text": '{"type": "text", "text": "…"}'},
            )
        if self.type not in self.model_fields_set:
            raise PydanticCustomError("part", "lacks the field `{part}`", {"part": self.type})
        return self


def _content_kind(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS), Tag("<parts>")],
    Discriminator(
        _content_kind, custom_error_type="content", custom_error_message="must be a string or an array of text parts"
    ),
]


def text_pieces(content: Content) -> list[str]:
    """A content's texts, in order."""
    if isinstance(content, str):
        return [content]
    return [part.text or part.refusal for part in content]


class Prediction(WireModel):
    """What the answer is expected to be: it then comes the faster the more of it is right, and is never changed by it."""

    type: Literal["content"]
    content: Content
    """A text, or parts that are joined."""

    @property
    def text(self) -> str:
        """The whole of it."""
        return "".join(text_pieces(self.content))
