"""Two models of different depth and shape draw pages from one pool at once, and neither notices the other.

What must not happen: a page read that the other model wrote, a prefix found that the other computed, an answer that
depends on who else is there.
"""

import copy
import random

import pytest
import torch

from compat_tests.engine.toy import Answers, drain, request
from compat_tests.tiny_models import make_model
from helix_gateway.core.kv import KVGroup
from helix_gateway.engine.engine import Engine, EngineLimits
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.runtime.cpu.packing import pack_linears
from helix_gateway.runtime.pool import make_runners
from helix_gateway.runtime.torch_attention import TorchPagedAttention

CPU = torch.device("cpu")
LIMITS = EngineLimits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=24, max_queue_len=100)
SHAPE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
DEEP = ("llama", SHAPE | {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
WINDOWED = SHAPE | {
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
OTHER = ("gemma2", WINDOWED)


def make_packed(kind, options, seed=0):
    _, model = make_model(kind, options, seed)
    pack_linears(model)
    return model


def prompts_of(seed):
    dice = random.Random(seed)
    common = [dice.randrange(3, 256) for _ in range(20)]
    return [common[: 5 * i] + [dice.randrange(3, 256) for _ in range(11)] for i in range(5)]


def submit(engine, prompts, name="r"):
    for i, prompt in enumerate(prompts):
        engine.submit(
            request(f"{name}{i}", prompt, temperature=0.7, seed=i, max_tokens=20, logprobs=3, ignore_eos=True)
        )


def results(answers):
    return {
        request_id[-1]: (answer.token_ids, answer.logprobs, answer.last.finish_reason)
        for (request_id, _), answer in answers.items()
    }


def alone(model, prompts, **options):
    (runner,) = make_runners([copy.deepcopy(model)], device=CPU, dtype=torch.float32, num_pages=400, **options)
    engine = Engine(runner, LIMITS)
    submit(engine, prompts)
    return results(drain(engine))


def pages_held(engine):
    tables = (engine.cache.tables(sequence.key) for sequence in engine.running)
    return {block for groups in tables for table in groups for block in table.blocks}


def generate_at_once(models, prompts, num_pages, **options):
    """Both models' answers over one pool, and which pages each held at each step."""
    runners = make_runners(copy.deepcopy(models), device=CPU, dtype=torch.float32, num_pages=num_pages, **options)
    groups = [group for runner in runners for group in runner.kv_groups]
    cache = PagedKVCache(groups, num_pages)
    engines = [Engine(runner, LIMITS, cache=cache) for runner in runners]
    for engine, own, name in zip(engines, prompts, "ab", strict=True):
        submit(engine, own, name)
    answers, held = [Answers(), Answers()], [[], []]
    for _ in range(2000):
        for engine, taken, pages in zip(engines, answers, held, strict=True):
            taken.take(engine.step())
            pages.append(pages_held(engine))
            cache.check()
        if not any(engine.has_work() for engine in engines):
            break
    assert cache.pool.num_referenced == 0
    return [results(taken) for taken in answers], held, engines


def assert_same_tokens(got, wanted, tolerance):
    """Equal but for the log-probabilities' last digits."""
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name, (tokens, logprobs, reason) in mine.items():
            assert (tokens, reason) == (theirs[name][0], theirs[name][2])
            values = [[entry.logprob for entry in side] for side in (logprobs, theirs[name][1])]
            assert values[0] == pytest.approx(values[1], abs=tolerance)


@pytest.mark.parametrize("attention", [None, TorchPagedAttention], ids=["compiled", "torch"])
def test_pages_pass_between_two_models_and_each_answers_as_if_alone(attention):
    models, prompts = [make_packed(*DEEP), make_packed(*OTHER)], [prompts_of(1), prompts_of(2)]
    wanted = [alone(model, own, attention=attention) for model, own in zip(models, prompts, strict=True)]
    got, held, engines = generate_at_once(models, prompts, num_pages=16, attention=attention)
    if attention is None:
        assert got == wanted
    else:  # torch sums over keys in an order that depends on how far sequences are padded: bits may differ, no more
        assert_same_tokens(got, wanted, tolerance=1e-4)
    # Memory was short, and pages went both ways: one model's, later the other's.
    assert sum(engine.num_preemptions for engine in engines) > 0
    for mine, others in (held, held[::-1]):
        assert any(mine[step] & others[later] for step in range(len(mine)) for later in range(step + 1, len(others)))
    assert not any(mine & others for mine, others in zip(*held, strict=True))


def test_a_model_does_not_find_what_its_own_twin_has_computed():
    twins, prompts = [make_packed(*DEEP, seed=0), make_packed(*DEEP, seed=1)], prompts_of(3)
    got, _, engines = generate_at_once(twins, [prompts, prompts], num_pages=400)
    assert got[0] != got[1]
    assert got == [alone(model, prompts) for model in twins]
    target, draft = (engine._scheduler._groups for engine in engines)
    cache, tokens = engines[0].cache, [*prompts[4], 0]
    assert cache.add("again", tokens, groups=target) == cache.add("draft", tokens, groups=draft) == 16
    assert not set(cache.tables("again")[0].blocks) & set(cache.tables("draft")[0].blocks)


def test_a_models_own_groups_bound_its_context_and_its_grain():
    target, draft = (KVGroup("model0/full", 4, None),), (KVGroup("model1/full", 10, None),)
    cache = PagedKVCache((*target, *draft), 22)
    assert (cache.capacity_tokens(target), cache.capacity_tokens(draft)) == (84, 210)
    tokens = list(range(20))
    for name, groups in (("a", target), ("b", draft)):
        cache.add(name, tokens, groups=groups)
        cache.reserve(name, 0, 20)
        cache.commit(name, tokens, 20)
    # Blocks of 4 and of 10 end together at 20 only; each model's prefix ends where its own do.
    assert cache.add("c", tokens[:13], groups=target) == 12
    assert cache.add("d", tokens[:13], groups=draft) == 10
    cache.check()


def test_groups_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        PagedKVCache((KVGroup("full", 4, None), KVGroup("full", 8, None)), 10)


def test_a_draft_in_another_dtype_shares_the_targets_pages():
    target, draft = make_packed(*DEEP), make_packed(*OTHER)
    _, half = make_model(*OTHER, 0)
    half = half.to(torch.bfloat16)
    pack_linears(half)
    prompts = prompts_of(4)
    got, *_ = generate_at_once([target, half], [prompts, prompts], num_pages=40)
    assert got[0] == alone(target, prompts)
    assert {key: reason for key, (*_, reason) in got[1].items()} == dict.fromkeys(alone(draft, prompts), "length")
