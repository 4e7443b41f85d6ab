"""The compiled linear layers of a CPU: right to float tolerance, and each row's bits its own."""

import gc
import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from compat_tests.effort import deeply
from helix_gateway.runtime.cpu import linear, packing, threads
from helix_gateway.runtime.cpu.linear import PackedEmbedding, PackedLinear, pack_weight
from helix_gateway.runtime.cpu.math import exp_f32, load_bf16, store_bf16
from helix_gateway.runtime.cpu.packing import pack_linears
from helix_gateway.runtime.cpu.products import NARROW, WIDE

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 3), (16, 1), (31, 7), (32, 16), (33, 64), (40, 3), (65, 129), (192, 576), (576, 192)]
"""(out_features, in_features): tiles whole and broken, inputs few and odd."""


def make_linear(channels: int, inputs: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(channels * 1000 + inputs)
    return nn.Linear(inputs, channels, bias=bias).to(dtype).requires_grad_(False)


def make_rows(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(inputs)).to(dtype)


def assert_close_to_exact(got: torch.Tensor, module: nn.Linear, x: torch.Tensor) -> None:
    """Within what float32 sums, or one rounding to bfloat16, may lose."""
    exact = nn.functional.linear(x.double(), module.weight.double())
    size = nn.functional.linear(x.double().abs(), module.weight.double().abs())
    if module.bias is not None:
        exact, size = exact + module.bias.double(), size + module.bias.double().abs()
    unit = torch.finfo(torch.float32).eps
    bound = size * unit * (module.in_features + 1)
    if x.dtype is torch.bfloat16:
        bound = bound + exact.abs() * torch.finfo(torch.bfloat16).eps / 2
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.fixture
def block_shape(monkeypatch):
    """Lets a test force the blocks of another processor."""

    def force(shape):
        monkeypatch.setattr(linear, "host_shape", lambda: shape)

    return force


@pytest.fixture
def thread_count(monkeypatch):
    """Lets a test force the number of threads, and small products onto several."""

    def force(count):
        monkeypatch.setattr(linear, "configure_threads", lambda: count)
        monkeypatch.setattr(linear, "_SERIAL_PRODUCT", 0)

    return force


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_gives_what_float64_gives(shape, bias, dtype):
    module = make_linear(*shape, dtype, bias=bias)
    packed = PackedLinear.from_linear(module)
    for rows in (1, 2, 7, 12, 13, 50):
        x = make_rows(rows, shape[1], dtype)
        got = packed(x)
        assert got.dtype is dtype
        assert got.is_contiguous()
        assert_close_to_exact(got, module, x)


@settings(max_examples=deeply(30, 1000), deadline=None)
@given(channels=st.integers(1, 130), inputs=st.integers(1, 90), rows=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_any_shape_gives_what_float64_gives(channels, inputs, rows, dtype):
    module = make_linear(channels, inputs, dtype)
    x = make_rows(rows, inputs, dtype)
    assert_close_to_exact(PackedLinear.from_linear(module)(x), module, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(65, 129), (192, 576), (33, 7)])
def test_a_row_has_the_same_bits_in_any_company_on_any_threads_and_processor(shape, dtype, block_shape, thread_count):
    packed = PackedLinear.from_linear(make_linear(*shape, dtype))
    x = make_rows(40, shape[1], dtype)
    thread_count(1)
    block_shape(WIDE)
    alone = torch.cat([packed(x[i : i + 1]) for i in range(40)])
    for registers in (WIDE, NARROW):
        block_shape(registers)
        for count in (1, 2, 3):
            thread_count(count)
            for rows in range(1, 41):
                assert torch.equal(packed(x[40 - rows :]), alone[40 - rows :]), (registers, count, rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_other_strides_give_what_their_copies_give(dtype):
    packed = PackedLinear.from_linear(make_linear(45, 24, dtype))
    wide = make_rows(10, 48, dtype)
    for view in (
        wide[:, 24:],
        wide[::3, :24],
        wide[:, ::2],
        wide[:, :24].flip(0),
        wide.T[:24].T,
        wide[:1, :24].expand(6, 24),
    ):
        assert torch.equal(packed(view), packed(view.clone(memory_format=torch.contiguous_format)))
    block = make_rows(30, 24, dtype).view(2, 5, 3, 24)
    assert torch.equal(packed(block).view(30, 45), packed(block.view(30, 24)))
    assert torch.equal(packed(block.transpose(0, 1)), packed(block).transpose(0, 1))
    assert packed(block[0, 0, 0]).shape == (45,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(dtype):
    packed = PackedLinear.from_linear(make_linear(45, 24, dtype))
    assert packed(torch.empty(0, 24, dtype=dtype)).shape == (0, 45)
    assert packed(torch.empty(2, 0, 24, dtype=dtype)).shape == (2, 0, 45)


def test_activations_that_do_not_fit_are_refused():
    packed = PackedLinear.from_linear(make_linear(45, 24, torch.float32))
    with pytest.raises(ValueError, match="expected 24 inputs"):
        packed(torch.zeros(2, 48))
    with pytest.raises(TypeError, match="bfloat16"):
        packed(torch.zeros(2, 24, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="float16"):
        PackedLinear.from_linear(nn.Linear(3, 3).half())


def test_a_bfloat16_result_is_the_nearest_and_ties_go_to_even():
    # 1 + n / 512 lies on or between two bfloat16 numbers near 1, which are 1 / 128 apart; sums are exact here.
    module = nn.Linear(2, 16, bias=False).to(torch.bfloat16).requires_grad_(False)
    module.weight[:, 0] = 1
    module.weight[:, 1] = torch.arange(16) / 512
    got = PackedLinear.from_linear(module)(torch.ones(1, 2, dtype=torch.bfloat16))[0]
    assert torch.equal(got, (1 + torch.arange(16) / 512).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype):
    packed = PackedLinear.from_linear(make_linear(45, 24, dtype))
    x = make_rows(5, 24, dtype)
    clean = packed(x)
    x[1, 3], x[3, 7] = math.nan, math.inf
    got = packed(x)
    assert got[1].isnan().all()
    assert got[3].isinf().all()
    assert torch.equal(got[[0, 2, 4]], clean[[0, 2, 4]])


def test_bfloat16_overflow_is_infinity_and_every_nan_stays_nan():
    bits = np.array([0x7F7FFFFF, 0xFF7FFFFF, 0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x00000001, 0x80000000], np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    module = nn.Linear(1, len(bits), bias=False).to(torch.bfloat16)
    got = [load_bf16(store_bf16(value)) for value in values.numpy()]
    np.testing.assert_array_equal(np.array(got, np.float32), values.bfloat16().float().numpy())
    module.weight.data[:, 0] = torch.tensor([3e38, -3e38, math.nan, math.inf, -math.inf, 1e-40, -0.0]).bfloat16()
    got = PackedLinear.from_linear(module)(torch.tensor([[2.0]], dtype=torch.bfloat16))[0]
    expected = (module.weight[:, 0].float() * 2).bfloat16()
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


def test_the_scalar_bfloat16_conversion_rounds_as_torch_does():
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    bits[:1000] = bits[:1000] & 0xFFFF0000 | 0x8000  # halfway between two
    values = bits.view(np.float32)
    got = np.array([load_bf16(store_bf16(value)) for value in values], np.float32)
    np.testing.assert_array_equal(got, torch.from_numpy(values).bfloat16().float().numpy())


def test_the_exponential_is_within_one_and_a_half_ulp_and_saturates():
    x = np.linspace(-87.3, 88.3, 20_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    got = np.array([exp_f32(value) for value in x], np.float32)
    assert (np.abs(got - exact) <= 1.5 * np.spacing(exact.astype(np.float32))).all()
    assert [float(exp_f32(np.float32(value))) for value in (0, -0.0, -88, -1e30, -math.inf)] == [1, 1, 0, 0, 0]
    assert float(exp_f32(np.float32(1e30))) == float(exp_f32(np.float32(math.inf))) > 2e38
    assert math.isnan(exp_f32(np.float32(math.nan)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 31, 64, 100])
def test_a_packed_matrix_gives_its_rows_back_bit_for_bit(channels, dtype):
    matrix = torch.randn(channels, 24).to(dtype)
    packed = pack_weight(matrix)
    assert torch.equal(packed.unpacked(), matrix)
    ids = torch.randint(0, channels, (3, 5))
    embedding = PackedEmbedding(packed)
    assert torch.equal(embedding(ids), nn.functional.embedding(ids, matrix))
    assert torch.equal(embedding(ids.int()), embedding(ids))
    assert embedding(ids[:0]).shape == (0, 5, 24)
    for wrong in (channels, -1):
        with pytest.raises(IndexError):
            embedding(torch.tensor([wrong]))


def tiny_llama(dtype, *, tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_gpt2(dtype):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", [lambda d: tiny_llama(d, tied=True), lambda d: tiny_llama(d, tied=False), tiny_gpt2])
@torch.inference_mode()
def test_a_packed_model_gives_the_logits_that_it_gave(build, dtype):
    model = build(dtype)
    ids = torch.randint(0, 97, (3, 11))
    expected = model(ids).logits
    pack_linears(model)
    assert not any(type(module) in (nn.Linear, Conv1D) for module in model.modules())
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(model(ids).logits, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_and_embedding_share_one_packed_matrix(tied):
    model = tiny_llama(torch.float32, tied=tied)
    pack_linears(model)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(head, PackedLinear)
    assert isinstance(embedding, PackedEmbedding if tied else nn.Embedding)
    assert not tied or head.weight_tiles is embedding.weight_tiles


def test_packing_frees_each_matrix_as_it_goes(monkeypatch):
    model = tiny_llama(torch.float32, tied=True)
    alive = weakref.WeakSet(module.weight for module in model.modules() if isinstance(module, nn.Linear))
    left, pack = [], packing.pack_weight

    def watched(matrix, **options):
        gc.collect()
        left.append(len(alive))
        return pack(matrix, **options)

    monkeypatch.setattr(packing, "pack_weight", watched)
    count = len(alive)
    pack_linears(model)
    assert left == list(range(count, 0, -1))
    gc.collect()
    assert len(alive) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_tiles_are_packed_where_the_matrix_lay(dtype):
    module = make_linear(64, 24, dtype)
    matrix, address = module.weight.detach().clone(), module.weight.data_ptr()
    model = nn.Sequential(module)
    pack_linears(model)
    assert model[0].weight_tiles.tiles.data_ptr() == address
    assert torch.equal(model[0].weight_tiles.unpacked(), matrix)


@pytest.mark.parametrize("channels", [48, 64])
def test_a_matrix_that_somebody_else_in_the_model_reads_is_not_overwritten(channels):
    class Normed(nn.Embedding):
        pass

    head, reader = make_linear(channels, 24, torch.float32), Normed(channels, 24)
    reader.weight = head.weight
    joined = torch.randn(2 * channels, 24)
    halves = [make_linear(channels, 24, torch.float32) for _ in range(2)]
    for half, matrix in zip(halves, joined.split(channels)):
        half.weight = nn.Parameter(matrix)
    kept, kept_joined = head.weight.detach().clone(), joined.clone()
    model = nn.Sequential(reader, head, *halves)
    pack_linears(model)
    assert torch.equal(reader.weight, kept)
    assert torch.equal(joined, kept_joined)
    assert torch.equal(model[1].weight_tiles.unpacked(), kept)


def test_modules_with_a_forward_of_their_own_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4), nn.Embedding(5, 4), nn.LayerNorm(4))
    before = list(model)
    pack_linears(model)
    assert [now is was for now, was in zip(model, before)] == [True, False, True, True]


def test_a_module_used_twice_is_packed_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Linear(4, 4))})
    pack_linears(model)
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["a"][0], PackedLinear)


def test_a_matrix_of_another_dtype_is_refused_by_its_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).half())
    with pytest.raises(TypeError, match=r"^1: .*float16"):
        pack_linears(model)


FIRST_PRODUCT = """
import numpy as np
from helix_gateway.runtime.cpu.products import host_shape, products
memory = np.zeros(4096, np.float32)
aligned = memory.ctypes.data + -memory.ctypes.data % 64
for bits in (32, 16):
    kernels = products(bits, host_shape())
    arguments = (1, aligned, 1, aligned + 256, aligned + 512, 1, aligned + 1024, aligned + 2048, 32)
    kernels.serial(*arguments)
    kernels.parallel(2, *arguments)
    print(len(kernels.serial.stats.cache_hits) + len(kernels.parallel.stats.cache_hits), end=" ")
"""


def run_first_product(package: Path, **environment: str) -> str:
    elsewhere = ("NUMBA_CACHE_DIR", "HELIX_CACHE")
    variables = {name: value for name, value in os.environ.items() if name not in elsewhere} | environment
    variables["PYTHONPATH"] = str(package)
    command = [sys.executable, "-c", FIRST_PRODUCT]
    return subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout.strip()


def test_a_second_process_finds_compiled_code_and_a_read_only_package_is_no_hindrance(tmp_path):
    source = Path(linear.__file__).parents[3]
    package = tmp_path / "package"
    shutil.copytree(source / "helix_gateway", package / "helix_gateway", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [package, *package.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    cache = tmp_path / "cache"
    assert run_first_product(package, XDG_CACHE_HOME=str(cache)) == "0 0"
    assert run_first_product(package, XDG_CACHE_HOME=str(cache)) == "2 2"
    assert not list(package.rglob("*.nbi"))
    unwritable = tmp_path / "file"
    unwritable.touch()
    assert run_first_product(package, XDG_CACHE_HOME=str(unwritable)) == "0 0"
    for path in [package, *package.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


THREAD_VARIABLES = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OMP_PROC_BIND", "GOMP_SPINCOUNT")


def test_threads_are_as_many_as_the_quota_allows(monkeypatch, tmp_path):
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_affinity", lambda: 8)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(threads, "_CGROUP_V2", quota)
    for text, cores, bound in (("max 100000", 8, True), ("250000 100000", 3, False), ("10000 100000", 1, False)):
        quota.write_text(text)
        assert threads.usable_cores() == cores
        environment = threads.engine_environment()
        assert environment["OMP_NUM_THREADS"] == environment["NUMBA_NUM_THREADS"] == str(cores)
        assert ("OMP_PROC_BIND" in environment) == bound


def test_threads_are_as_many_as_the_user_asked_for(monkeypatch):
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_affinity", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment = threads.engine_environment()
    assert environment["NUMBA_NUM_THREADS"] == "3"
    assert not environment.keys() & {"OMP_NUM_THREADS", "OMP_PROC_BIND"}
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    assert threads.wanted_threads() == 2


OPENMP_IN_USE = """
import torch, numba
from numba import njit, prange
from helix_gateway.runtime.cpu.threads import configure_threads
configure_threads()

@njit(parallel=True)
def touch(values):
    for i in prange(len(values)):
        values[i] += 1

touch(torch.zeros(4).numpy())
print(numba.threading_layer(), {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line})
"""


def test_a_system_without_openmp_uses_that_of_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "_loads", lambda library: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = os.environ | threads.engine_environment()
    if "LD_LIBRARY_PATH" not in environment:  # a torch without libgomp, or not Linux
        return
    command = [sys.executable, "-c", OPENMP_IN_USE]
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    layer, files = answer.split(maxsplit=1)
    assert layer == "omp"
    assert str(Path(torch.__file__).parent) in files
    assert files.count("gomp") == 1
