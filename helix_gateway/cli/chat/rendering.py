"""An answer on the screen while it arrives: as it is, or as Markdown, block by block.

What a model writes is text: control characters, with which it could move the cursor or rename the window, are left
out.  Knows nothing about where the text comes from.
"""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

_KEPT = "\n\t"
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in _KEPT}


def harmless(text: str) -> str:
    """The text without control characters but line feeds and tabs."""
    return text.translate(_CONTROLS)


class Renderer(Protocol):
    """Shows one answer after another."""

    def add(self, text: str) -> None:
        """Show more of the answer."""

    def end(self) -> None:
        """The answer is over, whole or not: show what was held back, and end the line."""


class PlainRenderer:
    """Text as it comes."""

    def __init__(self, console: "Console") -> None:
        self._console = console

    def add(self, text: str) -> None:
        """See `Renderer`."""
        self._console.file.write(harmless(text))
        self._console.file.flush()

    def end(self) -> None:
        """See `Renderer`."""
        self._console.file.write("\n")
        self._console.file.flush()


class MarkdownRenderer:
    """Markdown, each paragraph, list or block of code as soon as the next one begins."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._held = ""

    def add(self, text: str) -> None:
        """See `Renderer`."""
        self._held += harmless(text)
        cut = _end_of_whole_blocks(self._held)
        if cut:
            self._show(self._held[:cut])
            self._held = self._held[cut:]

    def end(self) -> None:
        """See `Renderer`."""
        self._show(self._held)
        self._held = ""

    def _show(self, text: str) -> None:
        from rich.markdown import Markdown

        if text.strip():
            self._console.print(Markdown(text))


def _end_of_whole_blocks(text: str) -> int:
    """Where the last empty line outside a fence ends; 0: there is none yet."""
    cut, place, fenced = 0, 0, False
    for line in text.splitlines(keepends=True):
        place += len(line)
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not line.strip() and line.endswith("\n") and not fenced:
            cut = place
    return cut
