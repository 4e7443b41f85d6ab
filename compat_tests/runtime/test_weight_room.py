"""Too little memory for weights is one line that says how much, and what to do; whoever could be served is not refused."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from compat_tests.tiny_models import LLAMA_LIKE_OPTIONS, TINY_MODELS, make_model
from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError
from helix_gateway.runtime import weight_room
from helix_gateway.runtime.checkpoints.safetensors_file import SafetensorsTensor
from helix_gateway.runtime.compiled_runner import CompiledRunner
from helix_gateway.runtime.cpu.attention import CpuPagedAttention
from helix_gateway.runtime.cpu.linear import PackedEmbedding, PackedLinear
from helix_gateway.runtime.cpu.quantised_weights import Int8Weight
from helix_gateway.runtime.description import Form
from helix_gateway.runtime.factory import load_runner, load_runners
from helix_gateway.runtime.loading import stored_sizes, unused_names
from helix_gateway.runtime.weight_room import NoRoomError, WeightRoom, Weights, held_bytes, is_ample

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own; compiled code stays where it is."""
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return saved(TINY_MODELS["llama"](0)[1], tmp_path / "model")


@pytest.fixture
def free(monkeypatch):
    """Lets so many bytes be free from now on, on each device."""

    def free(num_bytes):
        monkeypatch.setattr(weight_room, "obtainable_memory_bytes", lambda _: num_bytes)

    return free


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def load(path, **options):
    return load_runner(path, device="cpu", **{"max_tokens_in_use": 100, **options}).runner


def refusal(path, **options):
    with pytest.raises(NoRoomError) as refused, capture_logs() as logs:
        load(path, **options)
    assert not logs
    assert "\n" not in str(refused.value)
    return str(refused.value)


def held(runner):
    """Bytes of a loaded model's weights."""
    packed = {
        module.weight_tiles.tiles.data_ptr(): module.weight_tiles.tiles.nbytes
        for module in runner.model.modules()
        if isinstance(module, PackedLinear | PackedEmbedding)
    }
    return sum(packed.values()) + sum(parameter.nbytes for parameter in runner.model.parameters())


# ---- what is counted

FORMS = {
    "auto": ({}, Form("float32", "file")),
    "int8": ({"quantization": "int8"}, Form("float32", "int8")),
    "float32": ({"dtype": "float32"}, Form("float32", None)),
    "bfloat16": ({"dtype": "bfloat16"}, Form("bfloat16", None)),
}


@pytest.mark.parametrize("name", FORMS)
def test_of_the_default_model_it_is_little_less_than_what_its_weights_take(name, smollm2_path):
    options, form = FORMS[name]
    told, there = held_bytes(stored_sizes(smollm2_path), form), held(load(smollm2_path, **options))
    assert 0.99 * there < told <= there


@pytest.mark.parametrize(
    "family, quantization",
    [("llama", "int4"), *((family, name) for family in TINY_MODELS for name in ("int8", "none"))],
)
def test_of_no_model_it_is_more(family, quantization, tmp_path):
    path = saved(TINY_MODELS[family](0)[1], tmp_path / "model")
    form = Form("float32", None if quantization == "none" else quantization)
    assert 0 < held_bytes(stored_sizes(path), form) <= held(load(path, quantization=quantization))


def test_in_int8_inputs_that_are_no_pairs_of_groups_count_by_groups():
    table, matrix = (SimpleNamespace(shape=shape, block_kind=None) for shape in ((512, 96), (64, 96)))
    form = Form("float32", "int8")
    packed = Int8Weight.from_float(torch.zeros(64, 96)).tiles.nbytes
    assert held_bytes({"table": table, "matrix": matrix}, form) - held_bytes({"table": table}, form) == packed


def test_a_tied_table_that_is_stored_twice_counts_once(tmp_path):
    path = saved(make_model("llama", {**LLAMA_LIKE_OPTIONS, "tie_word_embeddings": True}, 0)[1], tmp_path)
    once = held_bytes(stored_sizes(path), Form("float32", None))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert held_bytes(stored_sizes(path), Form("float32", None)) == once <= held(load(path, dtype="float32"))


def test_layers_that_transformers_passes_over_do_not_count(folder, free, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"layers\.1\."])
    unused = unused_names(folder, stored_sizes(folder))
    assert unused
    assert all("layers.1." in name for name in unused)
    form = Form("float32", None)
    whole = held_bytes(stored_sizes(folder), form)
    free(whole - 1)
    WeightRoom([Weights(folder, form)], CPU, {}).check()


def test_a_gpu_holds_all_models_and_the_machine_one_after_the_other(folder, monkeypatch):
    form = Form("float32", None)
    needed = held_bytes(stored_sizes(folder), form)
    room = WeightRoom([Weights(folder, form)] * 2, torch.device("cuda"), {"--dtype bfloat16": Form("bfloat16", None)})

    def let(gpu, cpu):
        monkeypatch.setattr(
            weight_room, "obtainable_memory_bytes", lambda device: gpu if device.type == "cuda" else cpu
        )

    let(2 * needed, needed)
    room.check()
    let(2 * needed - 1, needed)
    with pytest.raises(NoRoomError, match="use --dtype bfloat16, a smaller model, or end"):
        room.check()
    let(2 * needed, needed - 1)
    with pytest.raises(NoRoomError, match="use --dtype bfloat16, a smaller model"):
        room.check()


def test_a_file_that_is_small_beside_the_memory_is_not_even_opened(tmp_path, free):
    (tmp_path / "model.gguf").write_bytes(bytes(100))
    free(3200)
    assert is_ample([str(tmp_path / "model.gguf")], CPU)
    free(3199)
    assert not is_ample([str(tmp_path / "model.gguf")], CPU)
    free(0)
    assert is_ample([str(tmp_path / "none")], CPU)


# ---- what is said


def test_weights_that_do_not_fit_are_refused_before_they_are_read(folder, free, monkeypatch):
    free(3 << 10)
    monkeypatch.setattr(SafetensorsTensor, "read", lambda *_: pytest.fail("read"))
    said = refusal(folder, dtype="float32")
    assert said.startswith(f"The weights of {folder} take 0.48 MiB, and 0.00 MiB of memory are free: ")
    assert said.endswith("free: use a smaller model, or end other programs.")


@pytest.mark.parametrize(
    "options, share, advised",
    [
        ({"dtype": "float32"}, 1 / 3, "use --quantization int8, --quantization int4, a smaller model, or end"),
        ({"dtype": "float32"}, 1 / 5, "use --quantization int4, a smaller model, or end"),
        ({"dtype": "float32"}, 1 / 9, "use a smaller model, or end"),
        ({"dtype": "bfloat16"}, 1 / 5, "use --quantization int4 without --dtype bfloat16, a smaller model, or end"),
        ({}, 1 / 5, "use --quantization int4, a smaller model, or end"),
        ({"quantization": "int4"}, 1 / 9, "use a smaller model, or end"),
    ],
)
def test_what_would_fit_is_advised(options, share, advised, folder, free):
    free(held_bytes(stored_sizes(folder), Form("float32", None)) * share)
    assert advised in refusal(folder, **options)


def test_a_target_and_its_draft_model_are_counted_together(folder, free, tmp_path):
    draft = saved(TINY_MODELS["llama"](1)[1], tmp_path / "draft")
    free(held_bytes(stored_sizes(folder), Form("float32", "int8")) * 1.5)
    load(folder)
    with pytest.raises(NoRoomError, match=f"of {folder} and {draft} take"):
        load_runners([folder, draft], device="cpu", max_tokens_in_use=100)


# ---- what is remembered, and what is found out too late

FULL = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 99\n"


def full(*_):
    raise RuntimeError(FULL)


def test_a_refusal_forgets_nothing(folder, free, monkeypatch):
    load(folder)
    with monkeypatch.context():
        free(1000)
        assert "take" in refusal(folder)
    free(1 << 40)
    assert type(load(folder)) is CompiledRunner


@pytest.mark.parametrize("is_remembered", [False, True])
def test_memory_that_runs_out_in_the_middle_is_said_so_and_nothing_is_forgotten(is_remembered, folder, monkeypatch):
    if is_remembered:
        load(folder)
    with monkeypatch.context() as patched:
        patched.setattr(SafetensorsTensor, "read", full)
        said = refusal(folder)
    assert said.startswith(
        f"Memory ran out while {folder} was being loaded, which takes more than the 0.12 MiB of its "
    )
    assert "free: use --quantization int4, a smaller model, or end other programs." in said
    assert (type(load(folder)) is CompiledRunner) == is_remembered


def test_files_that_cannot_even_be_looked_at_any_more_change_nothing_in_the_advice(folder, monkeypatch):
    def full_at_once(_):
        raise OutOfMemoryError(FULL)

    others = {f"--quantization {bits}": Form("float32", bits) for bits in ("int8", "int4")}
    room = WeightRoom([Weights(folder, Form("float32", "int8"))], CPU, others)
    monkeypatch.setattr(weight_room, "stored_sizes", full_at_once)
    advice = "use --quantization int4, a smaller model, or end other programs."
    assert str(room.run_out()) == f"Memory ran out while {folder} was being loaded: {advice}"


@pytest.mark.parametrize("is_remembered", [False, True])
def test_keys_and_values_that_are_refused_are_not_taken_for_weights(is_remembered, folder, monkeypatch):
    """However much is free once the weights are dropped again."""
    if is_remembered:
        load(folder)
    monkeypatch.setattr(CpuPagedAttention, "new_arena", full)
    with pytest.raises(ModelLoadError, match=r"KV cache does not fit beside the weights.*--kv-cache-memory"):
        load(folder)


def test_so_is_memory_that_runs_out_while_weights_are_packed(folder, monkeypatch):
    monkeypatch.setattr("helix_gateway.runtime.cpu.packing.pack_linears", full)
    assert "Memory ran out" in refusal(folder, dtype="float32")


LIMITED = """
import resource, sys
from pathlib import Path
import helix_gateway.runtime.runner, transformers.models.llama.modeling_llama
from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.factory import load_runner
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
if sys.argv[2] == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (450 << 20),) * 2)
try:
    load_runner(sys.argv[1], device="cpu", dtype="float32", max_tokens_in_use=100)
except ModelLoadError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for what is in use")
def test_a_system_that_gives_no_more_memory_is_understood(smollm2_path):
    command = [sys.executable, "-c", LIMITED, smollm2_path]
    # What compiles crashes where it gets no memory: that is done before.
    subprocess.run([*command, "unlimited"], timeout=240, check=True)
    done = subprocess.run([*command, "limited"], capture_output=True, text=True, timeout=120, check=True)
    (said,) = done.stdout.splitlines()
    assert said.startswith("Memory ran out while ")
    # How much they take too, if there is memory left to look it up.
    assert "use --quantization int8, --quantization int4, a smaller model, or end other programs." in said


def test_what_else_goes_wrong_is_not_put_down_to_memory(folder, monkeypatch):
    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(SafetensorsTensor, "read", broken)
    with pytest.raises(ModelLoadError, match="RuntimeError: something else") as refused:
        load(folder)
    assert not isinstance(refused.value, NoRoomError)
