"""Text that a model writes by itself: what its inputs are like, without any text from elsewhere.

Each sequence begins with a token that is drawn evenly from the vocabulary and goes on as the model's own probabilities
have it (Liu et al. 2023, LLM-QAT, section 3.1), in whatever languages and subjects the model has learned.  The same model
writes the same text.  Knows nothing about what it is for.
"""

import numpy as np
import numpy.typing as npt

from helix_gateway.core.step import LogitEdits, SamplingRows, StepBatch
from helix_gateway.runtime.paged_runner import PagedRunner

Int64s = npt.NDArray[np.int64]

_SEED = 4


def own_text(runner: PagedRunner, count: int, length: int) -> Int64s:
    """Token ids [count, length], over the first pages of the runner's pool; how many it has changes none of them.

    Raises:
        MemoryError: not one sequence fits into the pool.
    """
    ids = np.zeros((count, length), np.int64)
    ids[:, 0] = np.random.default_rng(_SEED).integers(0, runner.vocab_size, count)
    at_once = runner.num_pages // sum(_pages_of_each(runner, length))
    if not at_once:
        raise MemoryError(f"the pool has {runner.num_pages} pages, which do not hold {length} tokens")
    for first in range(0, count, at_once):
        _go_on(runner, ids[first : first + at_once], first)
    return ids


def _go_on(runner: PagedRunner, ids: Int64s, first: int) -> None:
    """Write the sequences whose first tokens are there, numbered from ``first`` on."""
    numbers = np.arange(first, first + len(ids))
    for position in range(ids.shape[1] - 1):
        logits = runner.forward(_step(runner, ids, position))
        ids[:, position + 1] = runner.sample(logits, _as_they_are(runner.vocab_size, numbers, position + 1))


def _step(runner: PagedRunner, ids: Int64s, position: int) -> StepBatch:
    """One more token of each sequence."""
    count, length = ids.shape
    return StepBatch(
        token_ids=ids[:, position].astype(np.int32),
        positions=np.full(count, position, np.int32),
        cu_seqlens=np.arange(count + 1, dtype=np.int32),
        context_lens=np.full(count, position + 1, np.int32),
        block_tables=_tables(runner, count, length),
        logits_rows=np.arange(count, dtype=np.int32),
    )


def _pages_of_each(runner: PagedRunner, length: int) -> list[int]:
    """How many pages of each group a sequence needs."""
    return [-(-length // group.tokens_per_block) for group in runner.kv_groups]


def _tables(runner: PagedRunner, count: int, length: int) -> tuple[npt.NDArray[np.int32], ...]:
    """Pages of each sequence in each group, no page twice."""
    tables, first = [], 0
    for pages in _pages_of_each(runner, length):
        tables.append(np.arange(first, first + count * pages, dtype=np.int32).reshape(count, pages))
        first += count * pages
    return tuple(tables)


def _as_they_are(vocab_size: int, numbers: Int64s, position: int) -> SamplingRows:
    """A token of each of some sequences, as likely as the model has it."""
    none, count = np.zeros(0, np.int32), len(numbers)
    return SamplingRows(
        logits_index=np.arange(count, dtype=np.int32),
        seed=numbers.astype(np.uint64) + np.uint64(_SEED),
        choice=np.zeros(count, np.int32),
        position=np.full(count, position, np.int32),
        temperature=np.ones(count, np.float32),
        top_k=np.full(count, vocab_size, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        edits=LogitEdits(none, none, none.astype(np.float32), none.astype(np.float32)),
    )
