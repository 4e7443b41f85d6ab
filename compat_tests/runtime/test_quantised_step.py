"""Quantised models: what they answer beside the float32 model of the same weights, and that a row is its own."""

import copy
import json
import weakref
from contextlib import contextmanager
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from compat_tests.runtime.paged import Feeder, random_sequences, turn_wrongly_from
from compat_tests.tiny_models import LLAMA_LIKE_OPTIONS, TINY_MODELS, make_model
from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError
from helix_gateway.runtime.checkpoints.protocol import Blocks
from helix_gateway.runtime.cpu import quantised_llama
from helix_gateway.runtime.cpu.attention import CpuPagedAttention
from helix_gateway.runtime.cpu.attention_shape import WINDOW
from helix_gateway.runtime.cpu.linear import PackedEmbedding, PackedLinear
from helix_gateway.runtime.cpu.quantised_llama import QuantisedLlamaStep
from helix_gateway.runtime.cpu.quantised_weights import Int4Weight, Int8ChannelWeight, Int8Weight, QuantisedWeight
from helix_gateway.runtime.cpu.quantising import computing_exactly, is_quantised, quantise_model
from helix_gateway.runtime.cpu.weight_memory import WeightMemory
from helix_gateway.runtime.factory import load_runner, resolve_quantisation
from helix_gateway.runtime.pool import make_runners
from helix_gateway.runtime.promises import Promises
from helix_gateway.runtime.runner import TransformersRunner
from helix_gateway.text.tokenizer import Tokenizer

LLAMA_LIKE = ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite", "gemma2", "gemma3"]
OTHERS = ["gpt2", "starcoder2"]
VARIANTS = {
    "gemma, the first": ("gemma", {"head_dim": 16}),
    "granite with a scaled embedding": ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.2}),
    "phi3 that turns half of a head": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3 with a window": ("phi3", {"sliding_window": 11}),
    "qwen2 with a window in one layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama with biases and GELU": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "llama whose products are of both kinds of int8": (
        "llama",
        {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "llama of one layer": ("llama", {"num_hidden_layers": 1}),
    "llama whose head is its embedding": ("llama", {"tie_word_embeddings": True}),
    **{
        f"llama whose angles are {options['rope_type']}": ("llama", {"rope_parameters": {"rope_theta": 1e4, **options}})
        for options in (
            {"rope_type": "linear", "factor": 4.0},
            {"rope_type": "dynamic", "factor": 4.0},
            {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        )
    },
    "phi3 whose angles are longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0 + 0.2 * pair for pair in range(8)],
                "long_factor": [2.0 + 0.5 * pair for pair in range(8)],
            },
        },
    ),
}
"""Of families' options, those that the tiny models do not have; of transformers' kinds of angles, all but the plain one."""
TOLERANCE = 0.05
"""What rounding activations to int8 may change, as a share of the logits' spread, in a tiny model."""
SMOLLM2_TOLERANCE = 0.1
"""The same for thirty layers, on a text."""
MODULES_TOLERANCE = 0.01
"""How far the step may be from the modules over the same quantised products: a last bit may round an activation the other
way, which moves a logit by some thousandths of the spread; most runs differ by a ten-millionth."""

ODD = {
    "llama of odd widths": (
        "llama",
        {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 3, "num_key_value_heads": 3},
    )
}
"""Models of which the compiled step cannot be."""
STORED = {"int8": torch.float32, "int4": torch.int8}
"""What keys and values are stored as beside weights, where a test takes each once."""


def make_runner(name, quantisation="int8", seed=3, stored=torch.float32, num_pages=24):
    model = make_plain(name, seed)
    quantise_model(model, quantisation, Promises())
    (runner,) = make_runners([model], device=torch.device("cpu"), dtype=stored, num_pages=num_pages)
    return runner


def make_plain(name, seed=3):
    """transformers' model, in float32, with eager attention."""
    if name in TINY_MODELS:
        return TINY_MODELS[name](seed)[1]
    kind, options = {**VARIANTS, **ODD}[name]
    return make_model(kind, {**LLAMA_LIKE_OPTIONS, **options}, seed)[1]


def answers(runner, sequences, chunk=64, at_once=8):
    return Feeder(runner, sequences).run(chunk, at_once)


def module_answers(runner, sequences):
    """Of transformers' modules over the same quantised products."""
    compute, runner._compute = runner._compute, runner._through_transformers
    try:
        return answers(runner, sequences)
    finally:
        runner._compute = compute


def exact_answers(runner, sequences):
    """Of transformers' modules, in float32, with the same weights."""
    with computing_exactly(runner._model):
        return module_answers(runner, sequences)


def difference(got, wanted):
    """The size of all differences beside that of what tells one token's logit from another's."""
    got, wanted = torch.cat(got), torch.cat(wanted)
    return float((got - wanted).norm() / (wanted - wanted.mean(1, keepdim=True)).norm())


@pytest.mark.parametrize("quantisation", ["int8", "int4"])
@pytest.mark.parametrize("name", [*LLAMA_LIKE, *VARIANTS])
def test_a_llama_like_model_runs_as_one_call_and_answers_what_its_weights_answer(name, quantisation):
    runner, sequences = make_runner(name, quantisation), random_sequences([45, 17, 1])
    assert isinstance(runner._compute, QuantisedLlamaStep)
    got = answers(runner, sequences)
    assert difference(got, module_answers(runner, sequences)) < MODULES_TOLERANCE
    assert 0 < difference(got, exact_answers(runner, sequences)) < TOLERANCE


@pytest.mark.parametrize("name", [*LLAMA_LIKE, *VARIANTS])
def test_it_answers_what_transformers_own_attention_over_whole_texts_answers(name):
    """No page, chunk, packed layer or table of angles is ours in what it is held to, only the weights' numbers."""
    runner, sequences = make_runner(name), random_sequences([45, 17, 1])
    assert isinstance(runner._compute, QuantisedLlamaStep)
    plain = with_unpacked_weights(make_plain(name), runner._model)
    with torch.inference_mode():
        wanted = [plain(torch.from_numpy(tokens).long()[None]).logits[0] for tokens in sequences]
    assert 0 < difference(answers(runner, sequences, chunk=7), wanted) < TOLERANCE


def with_unpacked_weights(plain, packed):
    """A plain model with the numbers that a packed one's quantised matrices hold."""
    modules = dict(plain.named_modules())
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            modules[name].weight.data = module.weight_tiles.unpacked()
    return plain


@pytest.mark.parametrize("stored", [torch.int8, torch.bfloat16], ids=["int8", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_keys_and_values_may_be_coarser_and_batch_and_chunk_still_change_no_bit(name, stored):
    runner, sequences = make_runner(name, stored=stored, num_pages=64), random_sequences([45, 17, 1])
    assert isinstance(runner._compute, QuantisedLlamaStep)
    together = answers(runner, sequences)
    assert 0 < difference(together, exact_answers(runner, sequences)) < TOLERANCE
    assert difference(together, answers(make_runner(name), sequences)) > 0
    for mine, other in zip(answers(runner, sequences, chunk=3, at_once=2), together):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2"])
def test_rows_that_are_wanted_alone_twice_or_out_of_order_answer_what_they_do_among_all(name):
    """The last layer computes no others; a chunk of which none is wanted leaves its keys and values all the same."""
    feeder = Feeder(make_runner(name), random_sequences([45, 17, 9]))
    runner, chunk, rest = feeder.runner, [(0, 0, 30)], [(0, 30, 45), (1, 0, 17), (2, 0, 9)]
    runner.forward(feeder.batch(chunk))
    among_all = runner.forward(feeder.batch(rest))
    for wanted in ([40], [14, 31], [31, 0, 31, 14], [*range(41), *range(41)], []):
        assert len(runner.forward(replace(feeder.batch(chunk), logits_rows=np.zeros(0, np.int32)))) == 0
        rows = np.array(wanted, np.int32)
        assert torch.equal(runner.forward(replace(feeder.batch(rest), logits_rows=rows)), among_all[wanted])


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_model_goes_through_its_modules(name):
    runner, sequences = make_runner(name), random_sequences([45, 17, 1])
    assert not isinstance(runner._compute, QuantisedLlamaStep)
    assert any(isinstance(m, PackedLinear) and isinstance(m.weight_tiles, Int8Weight) for m in runner._model.modules())
    assert 0 < difference(answers(runner, sequences), exact_answers(runner, sequences)) < TOLERANCE


@pytest.mark.parametrize("quantisation", ["int8", "int4"])
def test_a_llama_of_odd_widths_goes_through_its_modules_and_the_log_says_why(quantisation):
    with capture_logs() as lines:
        runner = make_runner("llama of odd widths", quantisation)
    assert not isinstance(runner._compute, QuantisedLlamaStep)
    assert is_quantised(runner._model)
    (said,) = (line for line in lines if line["event"] == "no_compiled_step")
    assert said["reason"] == "widths are no multiples of 32: 72, 100"
    sequences = random_sequences([45, 17, 1])
    assert 0 < difference(answers(runner, sequences), exact_answers(runner, sequences)) < TOLERANCE


@pytest.mark.parametrize(
    "name, quantisation",
    [(name, kind) for name in LLAMA_LIKE for kind in ("int8", "int4")] + [(name, "int8") for name in VARIANTS],
)
def test_batch_chunk_and_order_change_no_bit(name, quantisation):
    # Four bits over int8 pages, as they are served.
    runner = make_runner(name, quantisation, stored=STORED[quantisation], num_pages=48)
    sequences = random_sequences([37, 5, 64, 1, 20])
    alone = answers(runner, sequences, chunk=1, at_once=1)
    for chunk, at_once in ((64, 5), (7, 3), (13, 1), (1, 5)):
        for got, wanted in zip(answers(runner, sequences, chunk, at_once), alone):
            assert torch.equal(got, wanted)
    back = answers(runner, sequences[::-1], 11, 5)[::-1]
    assert all(torch.equal(got, wanted) for got, wanted in zip(back, alone))


@pytest.mark.parametrize(
    "quantisation, stored",
    [("int8", torch.float32), ("int8", torch.int8), ("int4", torch.int8)],
    ids=["int8", "int8 over int8 pages", "int4 over int8 pages"],
)
def test_any_number_of_rows_up_to_64_in_any_order_changes_no_bit(quantisation, stored):
    runner, sequences = make_runner("llama", quantisation, stored=stored), random_sequences([2] * 22)
    alone, dice = answers(runner, sequences, 1, 1), np.random.default_rng(0)
    for at_once in range(1, 23):
        order = dice.permutation(22)
        for got, row in zip(answers(runner, [sequences[row] for row in order], 2, at_once), order):
            assert torch.equal(got, alone[row])
    long = random_sequences([64])
    alone = answers(runner, long, 1, 1)
    for rows in range(2, 65):
        assert torch.equal(answers(runner, long, rows, 1)[0], alone[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads, monkeypatch):
    """Three where there are two: one thread then takes two turns of the region, one after the other."""
    runner, sequences = make_runner("llama", "int4"), random_sequences([37, 5, 20])
    wanted = answers(runner, sequences)
    plan_threads = runner._pages.attention._works.shape[0]
    monkeypatch.setattr(quantised_llama, "configure_threads", lambda: threads)
    works = np.empty((3, runner._pages.attention._works.shape[1]), np.float32)
    all_steps = runner._pages.attention.all_steps

    def with_works():
        plans, pages = all_steps()
        return plans, pages._replace(works=works)

    monkeypatch.setattr(runner._pages.attention, "all_steps", with_works)
    assert plan_threads >= 1
    assert all(torch.equal(got, same) for got, same in zip(answers(runner, sequences), wanted))


def test_ids_may_have_other_bits_or_not_be_written_to():
    """Such an array is another type to numba, and what is linked answers to the types of the first step."""
    runner = make_runner("llama")
    batch = Feeder(runner, random_sequences([9])).batch([(0, 0, 9)])
    expected = runner.forward(batch)
    unwritable = batch.token_ids.copy()
    unwritable.setflags(write=False)
    for token_ids in (batch.token_ids.astype(np.int64), unwritable):
        assert torch.equal(runner.forward(replace(batch, token_ids=token_ids)), expected)


def test_rows_may_be_wanted_twice_or_not_at_all():
    runner, sequences = make_runner("llama"), random_sequences([9])
    feeder = Feeder(runner, sequences)
    batch = feeder.batch([(0, 0, 9)])
    whole = runner.forward(batch)
    some = type(batch)(
        batch.token_ids,
        batch.positions,
        batch.cu_seqlens,
        batch.context_lens,
        batch.block_tables,
        np.array([8, 2, 8], np.int32),
    )
    assert torch.equal(runner.forward(some), whole[[8, 2, 8]])
    none = type(batch)(
        batch.token_ids,
        batch.positions,
        batch.cu_seqlens,
        batch.context_lens,
        batch.block_tables,
        np.zeros(0, np.int32),
    )
    assert runner.forward(none).shape == (0, 256)


def test_memory_that_was_refused_is_not_taken_for_there(monkeypatch):
    """A step of more rows than ever before finds none; the next one, smaller but also larger than any, must not use the old."""
    runner, made = make_runner("llama"), []
    memory, empty = runner._compute._memory, torch.empty
    known = memory._rows

    def refusing(*sizes, **options):
        made.append(sizes)
        if len(made) > 3:
            raise MemoryError("no more")
        return empty(*sizes, **options)

    with monkeypatch.context() as patch, pytest.raises((MemoryError, OutOfMemoryError)):
        patch.setattr(torch, "empty", refusing)
        runner.forward(Feeder(runner, random_sequences([known + 8])).batch([(0, 0, known + 8)]))
    assert len(made) > 3
    runner.forward(Feeder(runner, random_sequences([known + 4])).batch([(0, 0, known + 4)]))
    assert all(len(numbers) >= known + 4 for numbers in memory._kept[:-1])


def test_a_step_that_is_wrong_gives_way_to_the_modules(monkeypatch):
    right = QuantisedLlamaStep.__call__
    monkeypatch.setattr(QuantisedLlamaStep, "__call__", lambda self, batch: right(self, batch).flip(0))
    runner, sequences = make_runner("llama"), random_sequences([45])
    assert not isinstance(runner._compute, QuantisedLlamaStep)
    assert difference(answers(runner, sequences), exact_answers(runner, sequences)) < TOLERANCE


@pytest.mark.parametrize("first_wrong", [17, 400])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_step_that_is_wrong_at_far_positions_only_gives_way_too(monkeypatch, name, first_wrong):
    turn_wrongly_from(first_wrong, QuantisedLlamaStep, monkeypatch)
    assert not isinstance(make_runner(name)._compute, QuantisedLlamaStep)


def test_a_step_that_takes_all_layers_for_those_of_one_window_gives_way_too(monkeypatch):
    monkeypatch.setattr(CpuPagedAttention, "all_steps", with_the_first_plan_for_all(CpuPagedAttention.all_steps))
    assert not isinstance(make_runner("gemma2")._compute, QuantisedLlamaStep)


def with_the_first_plan_for_all(right):
    def all_steps(self):
        plans, layers = right(self)
        shapes = layers.shapes.copy()
        shapes[:, WINDOW] = shapes[0, WINDOW]
        return plans, layers._replace(shapes=shapes)

    return all_steps


def spoil(owner, name, places, monkeypatch):
    """Make noise of the rows that are at certain positions of a trial."""
    right = getattr(owner, name)

    def wrong(self, batch):
        logits = right(self, batch).clone()
        rows = torch.from_numpy(np.isin(batch.positions[batch.logits_rows], places))
        logits[rows] = logits.std() * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))[rows]
        return logits

    monkeypatch.setattr(owner, name, wrong)


def spoil_modules(places, monkeypatch):
    """The same of the modules, as long as they compute with what is quantised."""
    right, spoilt = TransformersRunner._through_transformers, {"now": True}

    @contextmanager
    def exactly(model):
        spoilt["now"] = False
        with computing_exactly(model):
            yield
        spoilt["now"] = True

    spoil(TransformersRunner, "_through_transformers", places, monkeypatch)
    wrong = TransformersRunner._through_transformers

    def through(self, batch):
        return wrong(self, batch) if spoilt["now"] else right(self, batch)

    monkeypatch.setattr(TransformersRunner, "_through_transformers", through)
    monkeypatch.setattr("helix_gateway.runtime.runner.computing_exactly", exactly)


EVERYWHERE, FAR, ONE = range(10_000), range(300, 10_000), (15,)
"""Positions of a trial: all; those of the two rows near the context's end; that of a single row."""


def served(name):
    """What a tiny model is served by, and what was refused."""
    with capture_logs() as logs:
        runner = make_runner(name)
    refused = [line["event"] for line in logs if line["log_level"] == "warning"]
    return isinstance(runner._compute, QuantisedLlamaStep), is_quantised(runner._model), refused


def test_one_odd_row_of_the_modules_is_no_reason_to_refuse_them(monkeypatch):
    spoil_modules(ONE, monkeypatch)
    assert served("llama") == (True, True, [])


@pytest.mark.parametrize("places", [FAR, (15, 16), EVERYWHERE], ids=["far", "two", "all"])
def test_more_odd_rows_of_the_modules_give_way_to_float32(places, monkeypatch):
    spoil_modules(places, monkeypatch)
    _, quantised, refused = served("llama")
    assert not quantised
    assert refused[0] == "quantisation_refused"


@pytest.mark.parametrize("places", [EVERYWHERE, FAR, (16,)], ids=["all", "far", "one"])
def test_a_step_of_noise_gives_way_beside_modules_with_an_odd_row(places, monkeypatch):
    spoil_modules(ONE, monkeypatch)
    spoil(QuantisedLlamaStep, "__call__", places, monkeypatch)
    assert served("llama") == (False, True, ["compiled_step_refused"])


def test_a_step_has_no_odd_row_of_its_own(monkeypatch):
    spoil(QuantisedLlamaStep, "__call__", ONE, monkeypatch)
    assert served("llama") == (False, True, ["compiled_step_refused"])


def test_a_logit_that_is_no_number_is_never_odd(monkeypatch):
    right = QuantisedLlamaStep.__call__
    spoil_modules(ONE, monkeypatch)

    def wrong(self, batch):
        logits = right(self, batch).clone()
        logits[torch.from_numpy(batch.positions == ONE[0]), 0] = torch.nan
        return logits

    monkeypatch.setattr(QuantisedLlamaStep, "__call__", wrong)
    assert served("llama") == (False, True, ["compiled_step_refused"])


def test_products_that_are_wrong_give_way_to_float32(monkeypatch):
    right = QuantisedWeight.multiply
    monkeypatch.setattr(QuantisedLlamaStep, "__call__", lambda self, batch: 1 / 0)
    monkeypatch.setattr(QuantisedWeight, "multiply", lambda self, x, bias: right(self, x, bias).flip(0))
    runner = make_runner("llama")
    assert not any(
        isinstance(m.weight_tiles, QuantisedWeight)
        for m in runner._model.modules()
        if isinstance(m, PackedLinear | PackedEmbedding)
    )
    monkeypatch.undo()
    sequences = random_sequences([45])
    wanted = exact_answers(make_runner("llama"), sequences)
    assert difference(answers(runner, sequences), wanted) < 1e-4


def test_joined_products_hold_no_weight_twice():
    attention = make_runner("llama")._model.base_model.layers[0].self_attn
    tiles = [part.weight_tiles.tiles for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tiles}) == 1


def test_weights_that_were_moved_are_let_go_one_by_one(monkeypatch):
    before, left = [], []
    move = WeightMemory.move

    def noted(self, tensor):
        left.append(sum(original() is not None for original in before))
        before.append(weakref.ref(tensor))
        return move(self, tensor)

    monkeypatch.setattr(WeightMemory, "move", noted)
    make_runner("llama")
    assert len(before) > 4
    assert max(left) == 0


class FourBitMatrix:
    """A matrix in a file."""

    def __init__(self, numbers):
        self.numbers, self.shape = numbers, (numbers.shape[0], 32 * numbers.shape[1])

    def blocks(self):
        return Blocks("Q4_0", self.numbers)

    def read(self, dtype):
        flat = self.numbers.reshape(len(self.numbers), -1)
        return torch.from_numpy(gguf.quants.dequantize(flat, gguf.GGMLQuantizationType.Q4_0))


def test_blocks_beyond_what_kernels_hold_become_int8_and_others_stay():
    model, promises = copy.deepcopy(TINY_MODELS["llama"](3)[1]), Promises()
    mlp = model.base_model.layers[0].mlp
    dice, stored = np.random.default_rng(0), {}
    for part, scale in ((mlp.gate_proj, 8000), (mlp.up_proj, 9000)):
        rows, inputs = part.weight.shape
        numbers = dice.integers(0, 256, (rows, inputs // 32, 18), dtype=np.uint8)
        numbers[..., :2] = np.array([0.01], np.float16).view(np.uint8)
        numbers[3, 1, :2] = np.array([scale], np.float16).view(np.uint8)
        stored[part] = FourBitMatrix(numbers)
        part.weight = torch.nn.Parameter(promises.promise(stored[part]), requires_grad=False)
    wanted = [stored[part].read(None) for part in (mlp.gate_proj, mlp.up_proj)]
    with capture_logs() as lines:
        quantise_model(model, "file", promises)
    kept, coarser = mlp.gate_proj.weight_tiles, mlp.up_proj.weight_tiles
    assert (type(kept), type(coarser)) == (Int4Weight, Int8Weight)
    assert torch.equal(kept.unpacked(), wanted[0])
    steps = wanted[1].view(len(wanted[1]), -1, 32).abs().amax(2, keepdim=True) / 127
    off = (coarser.unpacked() - wanted[1]).abs().view(len(wanted[1]), -1, 32)
    assert (off <= 0.6 * steps).all()
    assert [(line["event"], line["stored"]) for line in lines] == [("blocks_quantised_to_int8", "Q4_0")]


@pytest.mark.parametrize("num_pages", [1, 2])
def test_the_trial_of_a_model_of_several_groups_stays_within_its_pages(num_pages, monkeypatch):
    right, pages = CpuPagedAttention.begin, []

    def begin(self, batch):
        pages.append([int(table.max()) for table in batch.block_tables])
        right(self, batch)

    monkeypatch.setattr(CpuPagedAttention, "begin", begin)
    runner = make_runner("gemma2", num_pages=num_pages)
    assert is_quantised(runner._model)
    assert pages[-1] == [0, num_pages - 1]
    assert all(max(tables) < num_pages for tables in pages)


@pytest.fixture(scope="module")
def smollm2(smollm2_path, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is remembered: it is its first start, through transformers.
        patch.setenv("HELIX_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_runner(smollm2_path, device="cpu", quantization="auto", max_tokens_in_use=4096).runner


def test_the_shipped_model_keeps_its_files_numbers_and_no_others(smollm2, smollm2_path):
    reader = gguf.GGUFReader(smollm2_path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    layer = smollm2._model.base_model.layers[7]
    for name, part, kind in (
        ("blk.7.ffn_down.weight", layer.mlp.down_proj, Int4Weight),
        ("blk.7.attn_v.weight", layer.self_attn.v_proj, Int4Weight),
        ("token_embd.weight", smollm2._model.lm_head, Int8Weight),
    ):
        tensor = stored[name]
        exact = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert type(part.weight_tiles) is kind
        assert np.array_equal(part.weight_tiles.unpacked().numpy(), exact)
    assert smollm2._model.base_model.embed_tokens.weight_tiles is smollm2._model.lm_head.weight_tiles


@pytest.mark.parametrize("quantisation, layers", [("int8", Int8ChannelWeight), ("int4", Int4Weight)])
def test_tables_have_eight_bits_in_groups_whatever_layers_have(quantisation, layers):
    model = make_runner("llama", quantisation)._model
    assert type(model.base_model.layers[0].mlp.down_proj.weight_tiles) is layers
    assert type(model.lm_head.weight_tiles) is Int8Weight
    assert type(model.base_model.embed_tokens.weight_tiles) is Int8Weight


def test_the_shipped_model_answers_what_its_weights_answer(smollm2, smollm2_path):
    assert isinstance(smollm2._compute, QuantisedLlamaStep)
    sequences = [np.array(Tokenizer.load(smollm2_path).encode(json.JSONDecoder.__doc__), np.int32)[:120]]
    got, wanted = answers(smollm2, sequences), exact_answers(smollm2, sequences)
    assert difference(got, wanted) < SMOLLM2_TOLERANCE
    same = (got[0].argmax(1) == wanted[0].argmax(1)).float().mean()
    assert same > 0.9


def test_batch_and_chunk_change_no_bit_of_the_shipped_model(smollm2):
    sequences = random_sequences([40, 9, 1, 23], vocab_size=49_000)
    alone = answers(smollm2, sequences, 1, 1)
    for chunk, at_once in ((64, 4), (7, 3)):
        assert all(torch.equal(a, b) for a, b in zip(answers(smollm2, sequences, chunk, at_once), alone))


def test_what_is_asked_for_where_it_cannot_be_had_is_refused():
    cpu, other = torch.device("cpu"), torch.device("mps")
    assert resolve_quantisation(cpu, "auto", "auto") == "file"
    assert resolve_quantisation(cpu, "float32", "auto") is None
    assert resolve_quantisation(other, "auto", "auto") is None
    assert resolve_quantisation(cpu, "float32", "int4") == "int4"
    with pytest.raises(ModelLoadError, match="is for CPUs"):
        resolve_quantisation(other, "auto", "int8")
    with pytest.raises(ModelLoadError, match="bfloat16"):
        resolve_quantisation(cpu, "bfloat16", "int8")
