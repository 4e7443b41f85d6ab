"""``helix chat``: talk with a model in the terminal, or answer one prompt from a pipe.

Turns flags into a conversation with a server; knows nothing about how either works.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helix_gateway.cli.numbers import finite
from helix_gateway.core.errors import HelixError
from helix_gateway.service.settings import DTypeName

if TYPE_CHECKING:
    from helix_gateway.cli.chat.conversation import Conversation
    from helix_gateway.cli.chat.own_server import OwnServer
    from helix_gateway.cli.openai_client import OpenAIClient

    Act = Callable[[OpenAIClient, str], Coroutine[Any, Any, None]]

_INTERRUPTED = 130

_Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="As for helix serve, which is started for it; with --base-url, the name that the server there knows.  "
        "Left out: SmolLM2-135M-Instruct; with --base-url, the one that is served.",
    ),
]
_BaseUrl = Annotated[
    str | None, typer.Option(help="Talk with the server there, with or without /v1.  [default: start one]")
]
_ApiKey = Annotated[str | None, typer.Option(envvar="HELIX_API_KEY", help="Key that the server there asks for.")]
_DType = Annotated[
    DTypeName | None,
    typer.Option(help="What the weights of the server started here are computed in.  [default: the server's own]"),
]
_System = Annotated[str | None, typer.Option(help="The system prompt.")]
_Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, max=2.0, callback=finite, help="0: always the likeliest.  [default: the server's own]"),
]
_MaxTokens = Annotated[int | None, typer.Option(min=1, help="Bound on each answer.  [default: the server's own]")]
_Markdown = Annotated[bool, typer.Option("--markdown", help="Show answers as Markdown, a paragraph at a time.")]


def chat(
    model: _Model = None,
    base_url: _BaseUrl = None,
    api_key: _ApiKey = None,
    dtype: _DType = None,
    system: _System = None,
    temperature: _Temperature = None,
    max_tokens: _MaxTokens = None,
    markdown: _Markdown = False,
) -> None:
    """Talk with a model in the terminal.  Reads one prompt where its input is a pipe, and answers it plainly."""
    from helix_gateway.cli.chat.conversation import Conversation

    conversation = Conversation(system, temperature, max_tokens)
    answer = _talking(conversation, markdown)
    if not sys.stdin.isatty():
        conversation.ask(_piped_prompt())
        answer = _answering_once(conversation)
    try:
        asyncio.run(_with_server(base_url, api_key, model, dtype, answer))
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None


def _piped_prompt() -> str:
    prompt = sys.stdin.read().strip()
    if not prompt:
        raise HelixError("There is no prompt: standard input is empty.")
    return prompt


async def _with_server(
    base_url: str | None, api_key: str | None, model: str | None, dtype: DTypeName | None, act: "Act"
) -> None:
    from helix_gateway.cli.openai_client import OpenAIClient

    async with contextlib.AsyncExitStack() as stack:
        if base_url is None:
            server = await stack.enter_async_context(_own_server(model, dtype))
            base_url, api_key, model = server.url, server.api_key, None
        client = await stack.enter_async_context(OpenAIClient(base_url, api_key))
        await act(client, await client.only_model(model))


@contextlib.asynccontextmanager
async def _own_server(model: str | None, dtype: DTypeName | None) -> "AsyncIterator[OwnServer]":
    """A server for this conversation; its model is fetched first, by this process, which can show how far it is."""
    from rich.console import Console

    from helix_gateway.cli.chat.own_server import OwnServer
    from helix_gateway.runtime.model_source import resolve, served_name

    path, name = resolve(model), served_name(model)
    async with contextlib.AsyncExitStack() as stack:
        with Console(stderr=True).status(f"Loading {name} (the first time kernels are compiled, about a minute)"):
            server = await stack.enter_async_context(OwnServer(path, name, dtype))
        yield server


def _talking(conversation: "Conversation", markdown: bool) -> "Act":
    async def talk(client: "OpenAIClient", model: str) -> None:
        from rich.console import Console

        from helix_gateway.cli.chat.conversation import NAMES
        from helix_gateway.cli.chat.editor import open_editor
        from helix_gateway.cli.chat.rendering import MarkdownRenderer, PlainRenderer
        from helix_gateway.cli.chat.terminal import TerminalChat

        console = Console()
        renderer = MarkdownRenderer(console) if markdown else PlainRenderer(console)
        await TerminalChat(client, model, conversation, open_editor(NAMES), console, renderer).run()

    return talk


def _answering_once(conversation: "Conversation") -> "Act":
    async def answer_once(client: "OpenAIClient", model: str) -> None:
        from rich.console import Console

        from helix_gateway.cli.chat.answers import Answer, stream_answer
        from helix_gateway.cli.chat.rendering import PlainRenderer

        renderer = PlainRenderer(Console())
        await stream_answer(client, conversation.body(model), renderer, Answer())
        renderer.end()

    return answer_once
