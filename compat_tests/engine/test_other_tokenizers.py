"""A draft model with another tokenizer: often right, and never to be seen in an answer.

The models are toys that know one book by heart, each in its own tokens: both go on as the book does from where the last
words stand in it, and are made to err by noise.
"""

import argparse
import inspect

import numpy as np
import pytest

from compat_tests.engine.toy import ToyRunner, drain, make_engine, request
from compat_tests.text import other_tokenizers
from helix_gateway.core.kv import KVGroup
from helix_gateway.engine.depth import FixedDepth
from helix_gateway.engine.drafters.chain import CostlyDrafter
from helix_gateway.engine.drafters.model import ModelDrafter
from helix_gateway.engine.drafting import AlwaysDrafting
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.text.translation.choice import translate_vocabularies
from helix_gateway.text.translation.vocabulary import ByteEncoder, Vocabulary

BOOK = inspect.getsource(argparse)[2000:8000] + "Größe: 12,50 € — 👩‍👩‍👧 你好，世界\n" * 20
LOOKED_BACK = (24, 8, 3)
"""Bytes by which a place in the book is found."""
BOOST = 11.0
NUM_PAGES = 2000


class Reader(ToyRunner):
    """A model that knows the book, in the tokens of one tokenizer."""

    @classmethod
    def of(cls, tokenizer, group):
        made = cls((group,), NUM_PAGES, tokenizer.vocab_size)
        made.vocabulary = Vocabulary(tokenizer, tokenizer.token_bytes_table)
        made.encoder = ByteEncoder(made.vocabulary)
        return made

    def _logits(self, batch, s, row):
        if row not in batch.logits_rows:
            return np.zeros(self.vocab_size)
        size, position = self.kv_groups[0].tokens_per_block, batch.positions[row]
        places = [divmod(p, size) for p in range(position + 1)]
        said = b"".join(self.vocabulary.bytes_of[self.pages[batch.block_tables[0][s, e], o]] for e, o in places)
        logits = np.random.default_rng([len(said), *said[-40:]]).normal(0, 1, self.vocab_size)
        following = goes_on(said)
        if following:
            logits[self.encoder.encode_behind(following)[0][0]] += BOOST
        return logits


def goes_on(said):
    """How the book goes on from where these bytes' last ones stand in it; nothing where they never do."""
    book = BOOK.encode()
    for size in LOOKED_BACK:
        place = book.find(said[-size:])
        if place >= 0:
            return book[place + min(size, len(said)) :][:40]
    return b""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("tokenizers"), other_tokenizers
    backend = made.byte_level()
    lacking = sorted(token for token in backend.get_vocab() if len(token) > 14)[:20]
    renumbered = made.renumbered(backend, by=7, without=lacking)
    return {
        "byte_level": made.load(backend, folder / "byte_level", eos_token="</s>"),
        "renumbered": made.load(renumbered, folder / "renumbered", eos_token="</s>"),
        "unigram": made.load(made.unigram(), folder / "unigram", eos_token="</s>", bos_token="<s>"),
    }


def answers_with(target, draft, depth, requests):
    runner = Reader.of(target, KVGroup("full", 4, None))
    drafts = Reader.of(draft, KVGroup("draft/full", 5, None))
    runner.pages = drafts.pages = np.full((NUM_PAGES, 5), -1, np.int64)
    cache = PagedKVCache((*runner.kv_groups, *drafts.kv_groups), NUM_PAGES)
    drafting = AlwaysDrafting()
    drafter = ModelDrafter(
        drafts,
        cache,
        drafting,
        context_length=NUM_PAGES,
        target_vocab_size=runner.vocab_size,
        translation=translate_vocabularies(target, draft),
    )
    engine = make_engine(
        runner=runner,
        cache=cache,
        budget=64,
        max_model_len=400,
        depth_policy=FixedDepth(depth),
        costly_drafter=CostlyDrafter(drafter, drafting),
    )
    for each in requests:
        engine.submit(each)
    answers = drain(engine)
    assert engine.cache.pool.num_referenced == 0
    return answers


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    "names", ["byte_level unigram", "unigram byte_level", "byte_level renumbered", "renumbered byte_level"]
)
def test_its_drafts_are_often_right_and_change_nothing(tokenizers, names, temperature):
    target, draft = (tokenizers[name] for name in names.split())
    # The last one begins in the middle of a character.
    prompts = [target.encode(BOOK[place : place + 60]) for place in (0, 1500, 4000)]
    prompts.append(target.encode(BOOK[-200:-180] + "👩")[:-1])
    requests = [
        request(f"r{i}", prompt, temperature=temperature, seed=i, max_tokens=40, logprobs=2, ignore_eos=True)
        for i, prompt in enumerate(prompts)
    ]
    off = answers_with(target, draft, 0, requests)
    on = answers_with(target, draft, 4, requests)
    assert {key: (a.token_ids, a.logprobs) for key, a in on.items()} == {
        key: (a.token_ids, a.logprobs) for key, a in off.items()
    }
    drafted = sum(answer.last.metrics.draft_tokens for answer in on.values())
    accepted = sum(answer.last.metrics.accepted_tokens for answer in on.values())
    print(f"\n{names} at temperature {temperature}: {accepted} of {drafted} drafted tokens are right")
    assert accepted > (0.6 if temperature == 0 else 0.3) * drafted
    assert drafted > 60
