"""Real architectures, a target and a draft model over one arena: each answers as the target alone does, bit for bit.

One has a window and two KV groups, the other neither, and they differ in depth and in the shape of their KV.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_tests.effort import deeply
from compat_tests.engine.test_two_models import CPU, DEEP, OTHER, alone, make_packed, prompts_of, results, submit
from compat_tests.engine.toy import checked, drain
from helix_gateway.engine.depth import FixedDepth
from helix_gateway.engine.drafters.chain import CostlyDrafter
from helix_gateway.engine.drafters.model import ModelDrafter
from helix_gateway.engine.drafting import AlwaysDrafting
from helix_gateway.engine.engine import Engine, EngineLimits
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.runtime.pool import make_runners


def engine_over(models, num_pages, *, depth, budget, catch_up_tokens):
    # One by one: a list that holds a model twice would be copied as such.
    copies = [copy.deepcopy(model) for model in models]
    target, draft = make_runners(copies, device=CPU, dtype=torch.float32, num_pages=num_pages)
    cache = PagedKVCache((*target.kv_groups, *draft.kv_groups), num_pages)
    policy = AlwaysDrafting()
    drafter = ModelDrafter(
        draft,
        cache,
        policy,
        target_vocab_size=target.vocab_size,
        context_length=draft.context_length,
        catch_up_tokens=catch_up_tokens,
    )
    limits = EngineLimits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=budget, max_queue_len=100)
    costly = CostlyDrafter(drafter, policy)
    return checked(Engine(target, limits, cache=cache, depth_policy=FixedDepth(depth), costly_drafter=costly))


@pytest.fixture(scope="module")
def models():
    return {"deep": make_packed(*DEEP), "windowed": make_packed(*OTHER)}


@pytest.fixture(scope="module")
def wanted(models):
    return {(name, seed): alone(model, prompts_of(seed)) for name, model in models.items() for seed in range(3)}


@settings(max_examples=deeply(8, 300), deadline=None)
@given(st.data())
def test_a_crowd_of_any_size_gets_the_targets_own_answers(models, wanted, data):
    target, draft = data.draw(st.sampled_from([("deep", "windowed"), ("windowed", "deep"), ("windowed", "windowed")]))
    seed = data.draw(st.integers(0, 2))
    engine = engine_over(
        [models[target], models[draft]],
        data.draw(st.sampled_from([16, 20, 60])),
        depth=data.draw(st.integers(1, 6)),
        budget=data.draw(st.integers(6, 40)),
        catch_up_tokens=data.draw(st.sampled_from([3, 16, 64])),
    )
    # Twice, so that the second time prefixes are found.
    for _ in range(2):
        prompts = prompts_of(seed)
        submit(engine, prompts)
        assert results(drain(engine)) == wanted[target, seed]
        assert engine.cache.pool.num_referenced == 0


def test_while_memory_is_short_pages_pass_between_the_models_and_everybody_finishes(models, wanted):
    engine = engine_over([models["windowed"], models["deep"]], 16, depth=3, budget=24, catch_up_tokens=16)
    held = {"target": [], "draft": []}
    answers = {}
    for round_ in range(3):
        submit(engine, prompts_of(round_))
        taken = []
        while engine.has_work():
            taken += engine.step()
            engine.check()
            guests = engine.cache._guests
            for kind, pages in held.items():
                names = [name for name in engine.cache._tables if (name in guests) == (kind == "draft")]
                pages.append({block for name in names for table in engine.cache.tables(name) for block in table.blocks})
        answers[round_] = sum(event.finish_reason == "length" for event in taken)
    assert answers == dict.fromkeys(range(3), len(prompts_of(0)))
    steps = range(len(held["target"]))
    for mine, others in (("target", "draft"), ("draft", "target")):
        assert any(held[mine][step] & held[others][later] for step in steps for later in steps[step + 1 :])
    # The target alone would fit: nobody was preempted for the drafts.
    assert engine.num_preemptions == 0
    assert engine.cache.pool.num_referenced == 0


def test_a_twin_drafts_what_its_target_says(models):
    """With the request's noise at the very position: hardly a draft is wrong, at a temperature too."""
    engine = engine_over([models["deep"], models["deep"]], 400, depth=4, budget=64, catch_up_tokens=64)
    submit(engine, prompts_of(1))
    answers = drain(engine)
    metrics = [answer.last.metrics for answer in answers.values()]
    assert sum(m.accepted_tokens for m in metrics) == sum(m.draft_tokens for m in metrics) > 50
