"""A text that grows, and its tokens, kept as the tokenizer would cut the whole of it, at a cost that is the new text's.

Text that goes on can change how its last words are cut, but nothing far before them.  So only a window at the end is
encoded again, and joined to the tokens before it where the two agree: where the same two tokens in a row end at the
same byte in both.  What is left of that the window may have cut in its own way, since it does not begin where the text
does; the end of a word is a good place for it to begin.  Where nothing agrees (a run of one letter, a long number) the window grows, up to a bound.  A mistake costs drafts
that are less often right, nothing else.  Knows nothing about a second vocabulary.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence

from helix_gateway.text.translation.vocabulary import ByteEncoder, complete_bytes, starts_character

_WINDOWS_BYTES = (48, 512, 4096)
"""Of old text that is encoded again, tried in turn."""
_LOOKED_FOR_BYTES = 256
"""How far before that a good place for the window to begin is looked for; script without spaces has none."""
_LONGEST_CHARACTER_BYTES = 4


class GrowingText:
    """Tokens of one text.

    Args:
        encoder: cuts it.
        prefix: tokens that stand before it, whatever it is.
    """

    def __init__(self, encoder: ByteEncoder, prefix: Sequence[int]) -> None:
        self._encoder = encoder
        self._num_prefix_tokens = len(prefix)
        self._data = bytearray()
        self.token_ids = list(prefix)
        self._ends = array("q", [0] * len(prefix))

    @property
    def unsaid(self) -> bytes:
        """The beginning of a character that is still to be completed, where no token could be found for it."""
        said = self._ends[-1] if self._ends else 0
        tail = bytes(self._data[-_LONGEST_CHARACTER_BYTES:])
        return bytes(self._data[max(said, len(self._data) - len(tail) + complete_bytes(tail)) :])

    def append(self, data: bytes) -> int:
        """Let the text go on; answer how many of the tokens before stand where they stood."""
        if not data:
            return len(self.token_ids)
        old_bytes = len(self._data)
        self._data += data
        for window in _WINDOWS_BYTES:
            first, start = self._window(old_bytes - window)
            encode = self._encoder.encode_behind if start else self._encoder.encode
            ids, ends = encode(bytes(self._data[start:]))
            if first == self._num_prefix_tokens:
                kept, dropped = first, 0
                break
            kept, dropped = self._agreement(first, start, ids, ends)
            if kept > first:
                break
        return self._replace(kept, ids[dropped:], [start + end for end in ends[dropped:]])

    def _window(self, start: int) -> tuple[int, int]:
        """The first token that is cut anew, and its first byte: at ``start``, or a better place not far before."""
        first = bisect_right(self._ends, start, lo=self._num_prefix_tokens)
        if start < _LOOKED_FOR_BYTES:
            return self._num_prefix_tokens, 0
        for index in range(first, self._num_prefix_tokens, -1):
            at = self._ends[index - 1]
            if at < start - _LOOKED_FOR_BYTES:
                break
            if self._word_ends(at):
                return index, at
        while first > self._num_prefix_tokens and not starts_character(self._data, self._ends[first - 1]):
            first -= 1
        return first, self._ends[first - 1] if first > self._num_prefix_tokens else 0

    def _word_ends(self, at: int) -> bool:
        """Whether a space follows on something else here: no tokenizer in use looks across that."""
        return at > 0 and self._data[at : at + 1] == b" " and not self._data[at - 1 : at].isspace()

    def _agreement(self, first: int, start: int, ids: list[int], ends: list[int]) -> tuple[int, int]:
        """How many old tokens go before how many new ones are left out; (first, 0) where they never agree.

        Args:
            first, start: the window's first token and byte.
            ids, ends: of the window, cut anew.
        """
        old = {end - start: index for index, end in enumerate(self._ends[first:], first)}
        for index in range(1, len(ids)):
            before = old.get(ends[index])
            if (
                before is not None
                and before > first
                and self.token_ids[before] == ids[index]
                and self.token_ids[before - 1] == ids[index - 1]
                and self._ends[before - 1] == start + ends[index - 1]
            ):
                return before + 1, index + 1
        return first, 0

    def _replace(self, kept: int, ids: list[int], ends: list[int]) -> int:
        same = kept
        for old, new in zip(self.token_ids[kept:], ids):
            if old != new:
                break
            same += 1
        self.token_ids[kept:] = ids
        self._ends[kept:] = array("q", ends)
        return same
