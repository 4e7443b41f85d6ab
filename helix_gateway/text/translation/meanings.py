"""What the tokens of one vocabulary say in the text of another: their bytes, and for special tokens their counterparts.

A special token has one where the other vocabulary has a special token of the same spelling that is for the same, the end
of an answer or not; else any end stands for any end.  One without a counterpart says nothing.
"""

from helix_gateway.text.translation.vocabulary import Vocabulary


def special_counterparts(source: Vocabulary, other: Vocabulary) -> dict[int, int]:
    """Special tokens of ``other`` by those of ``source`` that mean the same."""
    ends = set(other.end_ids)
    spelt = {other.bytes_of[index]: index for index in other.special_ids}
    found: dict[int, int] = {}
    for token in {*source.special_ids, *source.end_ids}:
        same = spelt.get(source.bytes_of[token])
        is_end = token in source.end_ids
        if same is not None and (same in ends) == is_end:
            found[token] = same
        elif is_end and other.end_ids:
            found[token] = other.end_ids[0]
    return found


def bytes_in(other: Vocabulary, source: Vocabulary, counterparts: dict[int, int]) -> list[bytes]:
    """By token id of ``source``, what it says in a text that ``other`` encodes; nothing where it has no meaning there."""
    said = list(source.bytes_of)
    for token in {*source.special_ids, *source.end_ids}:
        counterpart = counterparts.get(token)
        said[token] = b"" if counterpart is None else other.bytes_of[counterpart]
    return said
