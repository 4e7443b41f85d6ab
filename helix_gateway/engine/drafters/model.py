"""Drafts from a second, smaller model in the same pool of pages.

Each draft position is one ragged forward for all sequences that still draft.  The model's own KV lies in tables of its
own, guests of the sequences' in the cache; what it lacks (verified tokens that it did not draft itself) is computed in
the forward of the first draft position, long prompts over several steps.  Tokens are drawn as the target draws them,
with the request's own options and noise at that position, so that two models which nearly agree draw the same token.
Knows nothing about what drafts are worth; who does is asked before each forward.
"""

from collections.abc import Sequence as Ordered
from time import perf_counter
from typing import Generic

from helix_gateway.core.protocols import Logits, ModelRunner, VocabularyTranslation
from helix_gateway.core.step import SamplingRows
from helix_gateway.engine.block_pool import NoFreeBlocksError
from helix_gateway.engine.drafters.base import DraftTokens
from helix_gateway.engine.drafters.draft_batch import (
    DraftPart,
    build_draft_rows,
    build_likeliest_rows,
    grow_drafts,
)
from helix_gateway.engine.drafters.draft_reader import DraftReader, ReadDraft
from helix_gateway.engine.drafters.same_vocabulary import SameVocabulary
from helix_gateway.engine.drafting import DraftingPolicy
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.sequence import Sequence, SequenceKey

_NEAR = 8
"""So many tokens are caught up with whatever else there is to do: as many as a step may have accepted."""
_READ_TOKENS = 1024
"""Through text they took 1.2 ms between byte-level tokenizers (docs/log.md), and take several times that with others."""


class ModelDrafter(Generic[Logits]):
    """`engine.drafters.base.ChoosyDrafter` over a model of its own.

    Args:
        runner: the draft model, over pages of the cache's pool.
        cache: where its blocks are accounted, beside the target's.
        policy: asked whether catching up and drafting on are worth it, and told what forwards take.
        context_length: tokens that a sequence of the draft model's may have; longer ones are not drafted for.
        target_vocab_size: logits that a row of the target's has.
        translation: between its tokens and the target's; None: they are the same.
        catch_up_tokens: most tokens computed at a step for sequences that the model lags far behind.
        read_tokens: most of the target's tokens that are translated at a step for such sequences, before that.
    """

    def __init__(
        self,
        runner: ModelRunner[Logits],
        cache: PagedKVCache,
        policy: DraftingPolicy,
        *,
        target_vocab_size: int,
        context_length: int,
        translation: VocabularyTranslation | None = None,
        catch_up_tokens: int = 64,
        read_tokens: int = _READ_TOKENS,
    ) -> None:
        self._runner = runner
        self._groups = tuple(runner.kv_groups)
        self._cache = cache
        self._policy = policy
        self._context_length = context_length
        self._target_vocab_size = target_vocab_size
        self._translation = translation or SameVocabulary(target_vocab_size, runner.vocab_size)
        self._allowed = self._translation.allowed(runner.vocab_size)
        self._catch_up_tokens = catch_up_tokens
        self._read_tokens = read_tokens
        self._readers: dict[SequenceKey, DraftReader] = {}
        self._step = 0

    def begin_step(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[int]:
        """See `ChoosyDrafter`."""
        self._step += 1
        return [min(depth, self._room(sequence)) for sequence, depth in zip(sequences, depths, strict=True)]

    def propose(self, sequences: Ordered[Sequence], depths: Ordered[int]) -> list[DraftTokens]:
        """See `Drafter`."""
        drafts = [self._begin(sequence, depth) for sequence, depth in zip(sequences, depths, strict=True)]
        parts = self._first_parts([draft for draft in self._read(drafts) if self._is_open(draft)])
        while parts:
            self._compute(parts)
            growing = [part.draft for part in parts if part.draws and not part.draft.is_done]
            parts = [
                DraftPart(draft, draft.position - 1, draft.token_ids[-1:], draws=True)
                for draft in self._going_on(growing)
            ]
        for draft in drafts:
            if draft.token_ids:
                draft.reader.rest.forget()
        return [draft.proposal() for draft in drafts]

    def give_back(self) -> None:
        """All blocks; what is needed of them is computed anew."""
        for reader in self._readers.values():
            self._close(reader)

    def retire(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        reader = self._readers.pop(sequence.key, None)
        if reader is not None:
            self._cache.remove(reader.key)

    def _going_on(self, drafts: list[ReadDraft]) -> list[ReadDraft]:
        if not drafts:
            return []
        goes_on = self._policy.goes_on([d.sequence for d in drafts], [d.as_drafted() for d in drafts])
        return [draft for draft, on in zip(drafts, goes_on, strict=True) if on]

    # --- what is there already, and what is computed first

    def _begin(self, sequence: Sequence, depth: int) -> ReadDraft:
        reader = self._readers.get(sequence.key)
        if reader is None:
            reader = self._readers[sequence.key] = DraftReader(sequence, self._translation.begin())
        return ReadDraft.begin(reader, depth, sequence.stop_ids if self._translation.shares_ids else frozenset())

    def _room(self, sequence: Sequence) -> int:
        """Tokens that could be drafted for a sequence, if it were read: none while it is left alone, or too long."""
        num_tokens = len(sequence.token_ids) if self._translation.shares_ids else 0
        reader = self._readers.get(sequence.key)
        if reader is None:
            return max(0, self._context_length - num_tokens)
        if reader.written and reader.key not in self._cache:
            # Memory was short, and will be again if all of it is computed anew at once.
            reader.written.clear()
            reader.rest.begin(self._step)
        if self._step < reader.rest.until:
            return 0
        room = self._context_length - max(num_tokens, len(reader.text.draft_token_ids))
        if room <= 0:
            self._close(reader)
        return max(0, room)

    def _read(self, drafts: list[ReadDraft]) -> list[ReadDraft]:
        """Let the draft model be told what came since; those that it was told all of.

        A long text is told a part at each step, nearest first, if drafting is worth what there is to compute then.
        """
        budget = self._read_tokens
        whole: list[ReadDraft] = []
        for draft in sorted(drafts, key=lambda draft: draft.reader.num_unread):
            reader = draft.reader
            count = unread = reader.num_unread
            if unread > _NEAR:
                if not self._policy.worth_catching_up(reader.sequence, reader.num_lacking):
                    continue
                count = min(unread, budget)
                draft.is_reading = count < unread
                if not count:
                    continue
                budget -= count
            reader.read(count)
            if count == unread:
                whole.append(draft)
        return whole

    def _is_open(self, draft: ReadDraft) -> bool:
        """Whether a sequence has tables, which are brought up to date; not one that turns out to be too long."""
        reader = draft.reader
        token_ids = reader.text.draft_token_ids
        draft.depth = min(draft.depth, self._context_length - len(token_ids))
        if not token_ids or draft.depth <= 0:
            self._close(reader)
            return False
        if reader.key in self._cache and self._has_left(reader):
            self._cache.remove(reader.key)
        if reader.key not in self._cache:
            host = reader.sequence.key
            salt = reader.sequence.request.cache_salt
            cached = self._cache.add(reader.key, token_ids, groups=self._groups, cache_salt=salt, host=host)
            reader.write(0, list(token_ids[:cached]))
        self._cache.commit(reader.key, token_ids, len(reader.written))
        return True

    def _close(self, reader: DraftReader) -> None:
        """Give back what a sequence holds that is not drafted for any more."""
        self._cache.remove(reader.key)
        reader.written.clear()

    def _has_left(self, reader: DraftReader) -> bool:
        """Whether a window has left behind what is read again, since tokens that were told have changed."""
        tables = self._cache.tables(reader.key)
        return any(table.first_needed(len(reader.written)) < table.num_released for table in tables)

    def _first_parts(self, drafts: list[ReadDraft]) -> list[DraftPart[ReadDraft]]:
        """What is lacking of each, nearest first; of those far behind a part, and no more than the budget together."""
        budget = self._catch_up_tokens
        catching_up: list[DraftPart[ReadDraft]] = []
        ready: list[DraftPart[ReadDraft]] = []
        for draft in sorted(drafts, key=lambda draft: draft.reader.num_behind):
            behind = draft.reader.num_behind
            count = behind
            if behind > _NEAR:
                if not self._policy.worth_catching_up(draft.reader.sequence, behind):
                    continue
                count = min(behind, budget)
                if not count:
                    draft.is_reading = True
                    continue
                budget -= count
            part = self._reserved(draft, count, len(drafts))
            if part is not None:
                (ready if part.draws else catching_up).append(part)
        going_on = set(self._going_on([part.draft for part in ready]))
        return catching_up + [part for part in ready if part.draft in going_on]

    def _reserved(self, draft: ReadDraft, count: int, num_drafts: int) -> DraftPart[ReadDraft] | None:
        """The next ``count`` tokens, with room for them and for the drafts behind them; None where memory is short."""
        reader = draft.reader
        start, token_ids = len(reader.written), reader.text.draft_token_ids
        draws = start + count == len(token_ids)
        end = start + count + (draft.depth - 1 if draws else 0)
        # Each sequence may itself want a block at any step; nor is a block worth taking that goes back at once.
        left = self._cache.pool.num_available - self._cache.blocks_needed(reader.key, start, end)
        if left < num_drafts:
            return None
        try:
            copies = self._cache.reserve(reader.key, start, end)
        except NoFreeBlocksError:
            return None
        if copies:
            self._runner.copy_pages(copies)
        return DraftPart(draft, start, list(token_ids[start : start + count]), draws)

    # --- one forward

    def _compute(self, parts: list[DraftPart[ReadDraft]]) -> None:
        """Write the parts' KV, and let drafts that draw grow by a token."""
        began = perf_counter()
        grow_drafts(self._runner, self._cache, parts, self._rows)
        for part in parts:
            part.draft.reader.write(part.start, part.token_ids)
            part.draft.is_reading = True
        self._policy.observe(sum(len(part.token_ids) for part in parts), perf_counter() - began)

    def _rows(self, drafts: list[ReadDraft]) -> SamplingRows:
        vocab_size = self._runner.vocab_size
        if self._translation.shares_ids:
            return build_draft_rows(drafts, vocab_size, self._target_vocab_size, self._allowed)
        return build_likeliest_rows(len(drafts), vocab_size, self._allowed)
