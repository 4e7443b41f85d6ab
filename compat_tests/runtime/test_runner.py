"""Every architecture through the runner alone: the numbers are transformers' own, however steps are cut up."""

import copy

import numpy as np
import pytest
import torch

from compat_tests.effort import usually
from compat_tests.runtime.paged import Feeder, random_sequences
from compat_tests.tiny_models import TINY_MODELS, make_model
from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.cpu.packing import pack_linears
from helix_gateway.runtime.pool import make_runners
from helix_gateway.runtime.torch_attention import TorchPagedAttention

CPU = torch.device("cpu")
LENGTHS = (40, 1, 23, 17)
# (block size, tokens a chunk, sequences at once)
CUTS = {"all at once": (16, 64, 4), "token by token": (16, 1, 4), "alone, odd": (5, 7, 1), "tiny blocks": (1, 33, 3)}


def make_runner(model, block_size=16, dtype=torch.float32, **options):
    (runner,) = make_runners([model], device=CPU, dtype=dtype, block_size=block_size, num_pages=300, **options)
    return runner


@torch.inference_mode()
def full_forward(model, sequences):
    return [model(torch.tensor(tokens[None], dtype=torch.long)).logits[0] for tokens in sequences]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_are_those_of_transformers_and_not_a_bit_depends_on_how_steps_are_cut(name):
    _, model = TINY_MODELS[name](1)
    sequences = random_sequences(LENGTHS)
    wanted = full_forward(model, sequences)
    pack_linears(model)
    first = None
    for cut, (block_size, chunk, at_once) in CUTS.items():
        got = Feeder(make_runner(copy.deepcopy(model), block_size), sequences, seed=chunk).run(chunk, at_once)
        for mine, theirs in zip(got, wanted):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
        first = first or got
        for mine, theirs in zip(got, first):
            assert torch.equal(mine, theirs), cut


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "cohere"])
def test_rows_that_fill_no_vector_do_not_depend_on_the_batch_either(kind):
    options = {
        "vocab_size": 256,
        "hidden_size": 60,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 20,
        "max_position_embeddings": 512,
        "sliding_window": 9,
        "eos_token_id": 2,
    }
    _, model = make_model(kind, options, 0)
    sequences = random_sequences(LENGTHS)
    pack_linears(model)
    together = Feeder(make_runner(copy.deepcopy(model)), sequences).run(64, 4)
    for chunk, at_once in ((1, 3), (7, 1)):
        for mine, theirs in zip(Feeder(make_runner(copy.deepcopy(model), 5), sequences).run(chunk, at_once), together):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_path_of_other_devices_gives_the_same_logits(name):
    _, model = TINY_MODELS[name](2)
    sequences = random_sequences(LENGTHS)
    wanted = full_forward(model, sequences)
    runner = make_runner(model, 5, attention=TorchPagedAttention)
    for mine, theirs in zip(Feeder(runner, sequences).run(9, 3), wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("attention", [None, TorchPagedAttention], ids=["compiled", "torch"])
def test_groups_of_different_shapes_share_one_pool_of_pages(attention):
    options = {
        "vocab_size": 256,
        "vocab_size_per_layer_input": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "max_position_embeddings": 512,
        "sliding_window": 9,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
    }
    _, model = make_model("gemma4_text", options, 0)
    sequences = random_sequences(LENGTHS)
    wanted = full_forward(model, sequences)
    runner = make_runner(model, 6, attention=attention)
    assert [(group.tokens_per_block, group.window) for group in runner.kv_groups] == [(6, 9), (12, None)]
    for mine, theirs in zip(Feeder(runner, sequences).run(5, 4), wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [usually(name, name == "llama") for name in TINY_MODELS])
def test_bfloat16_stays_near_float32_and_does_not_depend_on_the_batch(name):
    _, model = TINY_MODELS[name](4)
    sequences = random_sequences(LENGTHS)
    wanted = full_forward(model, sequences)
    model = model.to(torch.bfloat16)
    pack_linears(model)
    together = Feeder(make_runner(copy.deepcopy(model), 16, torch.bfloat16), sequences).run(64, 4)
    alone = Feeder(make_runner(model, 3, torch.bfloat16), sequences).run(5, 1)
    for mine, other, theirs in zip(together, alone, wanted):
        assert torch.equal(mine, other)
        assert (mine - theirs).abs().mean() < 0.05 * theirs.std()


def test_only_the_wanted_rows_have_logits():
    _, model = TINY_MODELS["cohere"](0)
    runner = make_runner(model)
    feeder = Feeder(runner, random_sequences((12,)))
    batch = feeder.batch([(0, 0, 12)])
    all_rows = runner.forward(batch)
    for rows in ([11], [0, 5], []):
        wanted = np.array(rows, np.int32)
        some = runner.forward(StepBatch(*(getattr(batch, name) for name in batch.__slots__[:-1]), wanted))
        assert some.dtype == torch.float32
        torch.testing.assert_close(some, all_rows[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", [None, TorchPagedAttention], ids=["compiled", "torch"])
def test_a_copied_page_serves_a_second_sequence(attention):
    _, model = TINY_MODELS["gemma2"](0)
    runner = make_runner(model, 4, attention=attention)
    common, ends = random_sequences((6,))[0], random_sequences((5, 5), seed=1)
    feeder = Feeder(runner, [np.concatenate([common, end]) for end in ends])
    feeder.step([(0, 0, 6)])
    # The second sequence reads the first one's full block, and goes on in a copy of its half-full one.
    for table, group in zip(feeder.tables, runner.kv_groups):
        assert group.tokens_per_block == 4
        table[1, 0] = table[0, 0]
        runner.copy_pages([(int(table[0, 1]), int(table[1, 1]))])
    feeder.done[1] = 6
    feeder.step([(0, 6, 11), (1, 6, 11)])
    wanted = [
        Feeder(make_runner(TINY_MODELS["gemma2"](0)[1], 4), [tokens]).run(11, 1)[0][6:] for tokens in feeder.sequences
    ]
    for parts, theirs in zip(feeder.logits, wanted):
        torch.testing.assert_close(parts[-1], theirs, rtol=1e-4, atol=2e-5)


def test_a_pool_takes_what_memory_holds_and_no_more_than_its_tokens_need():
    def pages(**options):
        _, model = TINY_MODELS["gemma3"](0)
        (runner,) = make_runners([model], device=CPU, dtype=torch.float32, block_size=16, **options)
        return runner.num_pages, runner.page_bytes

    count, page_bytes = pages(kv_memory_bytes=1 << 20)
    assert count == (1 << 20) // page_bytes
    # 100 tokens are 7 blocks of the windowed layers, and 3 of 48 tokens for the one full layer.
    assert pages(kv_memory_bytes=1 << 30, max_tokens=100)[0] == 7 + 3
    with pytest.raises(OutOfMemoryError, match="one block"):
        pages(kv_memory_bytes=page_bytes - 1)


def test_a_full_device_is_told_apart_from_a_broken_model():
    _, model = TINY_MODELS["llama"](0)
    with pytest.raises(OutOfMemoryError):
        make_runners([model], device=CPU, dtype=torch.float32, num_pages=1 << 36)
    _, model = TINY_MODELS["llama"](0)
    runner = make_runner(model)
    feeder = Feeder(runner, random_sequences((3,)))
    model.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(RuntimeError, match="size of tensor"):
        feeder.run(3, 1)


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("full"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_wherever_the_device_is_full_the_engine_is_told_so(error, monkeypatch):
    _, model = TINY_MODELS["llama"](0)
    runner = make_runner(model)
    batch = Feeder(runner, random_sequences((3,))).batch([(0, 0, 3)])
    index = np.zeros(1, np.int32)

    def full(*arguments):
        raise error

    monkeypatch.setattr(runner._pages.arena, "copy_pages", full)
    monkeypatch.setattr(runner, "_compute", full)
    monkeypatch.setattr(runner._sampler, "sample", full)
    monkeypatch.setattr(runner._sampler, "logprobs", full)
    for call in (
        lambda: runner.copy_pages([(0, 1)]),
        lambda: runner.forward(batch),
        lambda: runner.sample(torch.zeros(1, 256), None),
        lambda: runner.logprobs(torch.zeros(1, 256), index, index, 1),
    ):
        with pytest.raises(OutOfMemoryError):
            call()
