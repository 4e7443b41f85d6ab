"""Which draft tokens stand: all rows of all windows were sampled as plain decoding would have sampled them.

Row i of a window holds what the target itself chose after i draft tokens.  Drafts are *accepted* for as long as
they equal those choices; the choice where the first draft failed is the *recovered* token; the one after the
last draft, when all were accepted, is the *bonus*.  So the output is the plain output, whatever was drafted.
Knows nothing about how rows are sampled.
"""

from collections.abc import Sequence


def verify(sampled: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens that each window yields: accepted drafts, then one recovered or bonus token.

    Args:
        sampled: for each window the target's choices, one more than it has drafts; empty where nothing was
            sampled (a prefill chunk that does not reach the end).
        drafts: for each window its draft tokens.
    """
    return [list(choices[: _num_accepted(choices, draft) + 1]) for choices, draft in zip(sampled, drafts, strict=True)]


def _num_accepted(choices: Sequence[int], draft: Sequence[int]) -> int:
    if not draft:
        return 0
    for index, (choice, token) in enumerate(zip(choices, draft, strict=False)):
        if choice != token:
            return index
    return len(draft)
