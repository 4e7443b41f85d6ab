"""The loop of a conversation in a terminal: ask the user, ask the model, until the user leaves.

Knows nothing about which server answers.
"""

import asyncio
from typing import TYPE_CHECKING

from helix_gateway.cli.chat.answers import Answer, stream_answer
from helix_gateway.cli.chat.conversation import Conversation, Leave, obey
from helix_gateway.cli.chat.editor import cleaned
from helix_gateway.cli.chat.rendering import Renderer
from helix_gateway.cli.interrupts import on_interrupt
from helix_gateway.cli.openai_client import OpenAIClient, ServerError
from helix_gateway.core.errors import HelixError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from rich.console import Console

_PROMPT = "> "


class TerminalChat:
    """A conversation between a person at a terminal and one model."""

    def __init__(
        self,
        client: OpenAIClient,
        model: str,
        conversation: Conversation,
        editor: "PromptSession[str]",
        console: "Console",
        renderer: Renderer,
    ) -> None:
        self._client = client
        self._model = model
        self._conversation = conversation
        self._editor = editor
        self._console = console
        self._renderer = renderer

    async def run(self) -> None:
        """Go on until the user leaves: Ctrl-D, Ctrl-C at the prompt, or /quit."""
        self._tell(f"{self._model}: Enter sends, Ctrl-C stops an answer, Ctrl-D leaves, /help tells more.")
        try:
            while True:
                await self._turn(cleaned(await self._editor.prompt_async(_PROMPT)))
        except (EOFError, KeyboardInterrupt, Leave):
            return

    async def _turn(self, text: str) -> None:
        if text.startswith("/"):
            self._obey(text)
        elif text:
            self._conversation.ask(text)
            self._conversation.close_turn(await self._answer())

    def _obey(self, line: str) -> None:
        try:
            self._tell(obey(self._conversation, line))
        except HelixError as error:
            self._complain(str(error))

    async def _answer(self) -> str:
        """Show the next answer and return its text, as far as it came."""
        answer = Answer()
        body = self._conversation.body(self._model)
        streaming = asyncio.ensure_future(stream_answer(self._client, body, self._renderer, answer))
        ended = "whole"
        try:
            with on_interrupt(streaming.cancel):
                await streaming
        except asyncio.CancelledError:
            ended = "stopped"
        except ServerError as error:
            ended = str(error)
        if answer.text or ended == "whole":
            self._renderer.end()
        self._tell_end(answer, ended)
        return answer.text

    def _tell_end(self, answer: Answer, ended: str) -> None:
        if ended == "whole":
            self._tell(answer.figures())
        elif ended == "stopped":
            self._tell(f"stopped: {answer.figures()}")
        else:
            self._complain(ended)
            if "context" in ended:
                self._tell("/clear begins a new conversation.")

    def _tell(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False)

    def _complain(self, text: str) -> None:
        self._console.print(text, style="red", markup=False, highlight=False)
