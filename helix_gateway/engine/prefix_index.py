"""Finds full blocks again by what they hold: a chain of hashes over tokens.

The key of a block covers its tokens and, through its parent's key, all before them, so equal keys mean equal
prefixes.  The root covers what else changes KV: group, cache salt, adapter, rotary regime.  Knows nothing about
reference counts.  128 bits of BLAKE2b, since a collision would show one client another's text.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

BlockKey = bytes
_KEY_BYTES = 16


def root_key(group: str, *, cache_salt: str, adapter: str = "", rotary_regime: str = "") -> BlockKey:
    """The key in front of a sequence's first block."""
    parts = "\0".join((group, adapter, rotary_regime, cache_salt))
    return blake2b(parts.encode(), digest_size=_KEY_BYTES).digest()


def child_key(parent: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """The key of a full block that holds ``token_ids`` after ``parent``."""
    return blake2b(parent + np.asarray(token_ids, dtype=np.int32).tobytes(), digest_size=_KEY_BYTES).digest()


class PrefixIndex:
    """Which block holds the content of a key, both ways."""

    def __init__(self) -> None:
        self._blocks: dict[BlockKey, int] = {}
        self._keys: dict[int, BlockKey] = {}

    def find(self, key: BlockKey) -> int | None:
        """The block with this content, or None."""
        return self._blocks.get(key)

    def holds(self, block: int) -> bool:
        """Whether the block can be found, which also means that nobody may write to it."""
        return block in self._keys

    def key_of(self, block: int) -> BlockKey | None:
        """What the block can be found under, if it can."""
        return self._keys.get(block)

    def publish(self, block: int, key: BlockKey) -> None:
        """Let the block be found, unless another one with the same content already can."""
        if key not in self._blocks and block not in self._keys:
            self._blocks[key] = block
            self._keys[block] = key

    def forget(self, block: int) -> None:
        """The block's content is about to be overwritten."""
        del self._blocks[self._keys.pop(block)]

    def faults(self) -> Iterator[str]:
        """What is broken: the two directions must agree."""
        if {block: key for key, block in self._blocks.items()} != self._keys:
            yield "the prefix index finds a block under a key that is not the block's"
