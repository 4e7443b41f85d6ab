"""Finds stop strings in text that arrives in pieces, and holds back what could still become one.

A stop string ends a text where it is first complete: of all occurrences the one that ends first counts, and of those
that end together the longest.  That does not depend on how the text is cut into pieces, so the engine (a token at a
time) and the gateway (whatever came together) find the same.  Each character is looked at a bounded number of times:
what is kept between pieces is only the longest end of the text that begins some stop string.  Knows nothing about
how the pieces were made.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from helix_gateway.core.protocols import StopMatch
from helix_gateway.text.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class _Match:
    string: str
    end: int
    """Just behind the stop string, in the text that was searched."""


class _StopStringSearch:
    """The end of the text so far that could still become a stop string, and what to do with the next piece."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = sorted({string for string in strings if string})
        self._first_letters = frozenset(string[0] for string in self._strings)
        self._longest = max(map(len, self._strings), default=0)
        self.held = ""

    def feed(self, piece: str) -> tuple[str, _Match | None]:
        """Take a piece; answer the text to look at (what was held, and the piece) and the match in it, if any."""
        text = self.held + piece
        match = self._first_match(text)
        self.held = "" if match else self._longest_beginning(text)
        return text, match

    def _first_match(self, text: str) -> _Match | None:
        best: _Match | None = None
        for string in self._strings:
            start = text.find(string, 0, best.end if best else len(text))
            if start < 0:
                continue
            end = start + len(string)
            if best is None or end < best.end or len(string) > len(best.string):
                best = _Match(string, end)
        return best

    def _longest_beginning(self, text: str) -> str:
        """The longest end of the text that is the beginning of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_letters and self._begins_one(text[start:]):
                return text[start:]
        return ""

    def _begins_one(self, text: str) -> bool:
        # Sorted strings that share a beginning stand together, right where that beginning itself would stand.
        place = bisect_left(self._strings, text)
        return place < len(self._strings) and self._strings[place].startswith(text)


class StopStringCondition:
    """Stops a sequence at the token that completes a stop string (`core.protocols.StopCondition`).

    Args:
        strings: what ends the text.
        detokenizer: a fresh one of this sequence, making the same text as the one that the client's text comes from.
    """

    def __init__(self, strings: Sequence[str], detokenizer: Detokenizer) -> None:
        self._search = _StopStringSearch(strings)
        self._detokenizer = detokenizer

    def feed(self, token_ids: Sequence[int]) -> StopMatch | None:
        """Take the tokens just verified; answer where the first stop string is complete, or None to go on."""
        for count, token_id in enumerate(token_ids, start=1):
            piece = self._detokenizer.feed((token_id,))
            match = self._search.feed(piece)[1] if piece else None
            if match is not None:
                return StopMatch(num_tokens=count, reason=match.string)
        return None


class StopStringFilter:
    """Passes text on until a stop string is complete, never text that one could still take back.

    Args:
        strings: what ends the text.
        include_in_output: whether the stop string itself is passed on.
    """

    def __init__(self, strings: Sequence[str], *, include_in_output: bool = False) -> None:
        self._search = _StopStringSearch(strings)
        self._include = include_in_output
        self.matched: str | None = None
        """The stop string that ended the text, once one has; what is fed after that is dropped."""

    def feed(self, piece: str) -> str:
        """Take the next piece; answer the text that is certain to belong to the answer."""
        if self.matched is not None:
            return ""
        text, match = self._search.feed(piece)
        if match is None:
            return text[: len(text) - len(self._search.held)]
        self.matched = match.string
        return text[: match.end if self._include else match.end - len(match.string)]

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        held, self._search.held = self._search.held, ""
        return held
