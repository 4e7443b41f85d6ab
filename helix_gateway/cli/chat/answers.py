"""One answer: asked for, shown while it arrives, and what it was like.

Knows nothing about how the question came about.
"""

from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter

from helix_gateway.cli.chat.rendering import Renderer
from helix_gateway.cli.openai_client import OpenAIClient


@dataclass(slots=True)
class Answer:
    """What has come so far; filled while it streams, so that whoever stops it has what there is."""

    text: str = ""
    tokens: int = 0
    """By the server's count; without one, pieces of the stream."""
    finish_reason: str | None = None
    first_s: float | None = None
    """From the question to the first piece."""
    last_s: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Of all tokens but the first; None where there are too few to tell."""
        if self.first_s is None or self.tokens < 2 or self.last_s <= self.first_s:
            return None
        return (self.tokens - 1) / (self.last_s - self.first_s)

    def figures(self) -> str:
        """One line for the user."""
        parts = [f"{self.tokens} token{'s' * (self.tokens != 1)}"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
        if self.first_s is not None:
            parts.append(f"first after {self.first_s:.2f} s")
        if self.finish_reason == "length":
            parts.append("cut off: no tokens left")
        return ", ".join(parts)


async def stream_answer(client: OpenAIClient, body: bytes, renderer: Renderer, answer: Answer) -> None:
    """Ask, and show and note what comes.

    Raises:
        ServerError: the server refused, or broke off.
    """
    start_s = perf_counter()
    async with aclosing(client.stream("chat", body)) as pieces:
        async for piece in pieces:
            if piece.text or piece.reasoning:
                answer.last_s = piece.at_s - start_s
                answer.first_s = answer.last_s if answer.first_s is None else answer.first_s
                answer.tokens += 1
                answer.text += piece.text
                renderer.add(piece.reasoning + piece.text)
            answer.finish_reason = piece.finish_reason or answer.finish_reason
            if piece.usage is not None:
                answer.tokens = piece.usage.completion_tokens
