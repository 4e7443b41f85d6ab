"""Writes a conversation as one prompt, with the model's own Jinja template in a sandbox.

What a template raises, and whatever else goes wrong inside it, is a fault of the request: an `InvalidRequestError`
with its message.  `plain_messages` brings OpenAI's messages to the form that templates expect.  Knows nothing about
tokens or HTTP.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from helix_gateway.core.errors import InvalidRequestError
from helix_gateway.text.encodable import check_encodable

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What clients call it; the first counts."""


class ChatTemplate:
    """One model's template.

    Args:
        source: the template, in Jinja.
        special_tokens: texts that a template may ask for by name (``bos_token``, ``eos_token``).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text.

        Args:
            messages: as `plain_messages` gives them.
            add_generation_prompt: whether the text ends where the assistant's answer begins.
            tools: JSON schemas of functions, for templates that know how to write them.
            variables: whatever else the template reads (``enable_thinking``).

        Raises:
            InvalidRequestError: the template refused the messages, or failed on them.
        """
        try:
            return self._compiled.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **(variables or {})},
            )
        except Exception as error:  # A template is a program of its own, and can raise whatever a program can.
            raise InvalidRequestError(
                f"The model's chat template does not accept these messages: {error}", param="messages"
            ) from error

    @cached_property
    def _compiled(self) -> "Template":
        # Imported here: a server of completions needs no Jinja.
        from helix_gateway.text.template_sandbox import compile_template

        return compile_template(self.source)


def _with_reasoning(message: Message) -> dict[str, Any]:
    """A message whose reasoning is found under the names that templates look for it by, as transformers has it."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return dict(message) if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def no_chat_template() -> InvalidRequestError:
    """What to answer when a model without a template is asked to chat."""
    return InvalidRequestError(
        "This model has no chat template, so it cannot take messages; send a prompt to /v1/completions instead.",
        param="messages",
    )


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """OpenAI's messages as templates expect them; every other field of a message stays as it is.

    Parts of text are joined into one string, no content is the empty string, and ``developer`` is ``system``.

    Raises:
        InvalidRequestError: a part is not text, named by its path.
    """
    return [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain_message(message: Message, path: str) -> dict[str, Any]:
    role = "system" if message.get("role") == "developer" else message.get("role")
    return {**message, "role": role, "content": _plain_content(message.get("content"), f"{path}.content")}


def _plain_content(content: Any, path: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        check_encodable(content, param=path)
        return content
    return "".join(_part_text(part, f"{path}[{index}]") for index, part in enumerate(content))


def _part_text(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise InvalidRequestError(
            f"{path} is of type {kind!r}; this model reads text alone, in parts of the form "
            '{"type": "text", "text": "…"}.',
            param=path,
        )
    check_encodable(text, param=f"{path}.text")
    return text
