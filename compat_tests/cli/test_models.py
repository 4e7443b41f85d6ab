"""``helix models``: what is in the caches is told as it is, a pull really pulls, and a removal asks first."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants
from hub_server import HubServer

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.sources.model_facts import read_facts


def safetensors(**tensors):
    """A file of zeros: names, each with its type, shape and bytes."""
    header, offset = {}, 0
    for name, (dtype, shape, size_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size_bytes]}
        offset += size_bytes
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + bytes(offset)


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 2048}
FOLDER = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": safetensors(a=("BF16", [8, 100], 1600), b=("F32", [10], 40)),
    "tokenizer.json": b"{}",
    "pictures.bin": b"not needed",
}


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(4096)
    packed = quants.quantize(np.ones((4, 64), dtype=np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("big", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("norm", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def helix(tmp_path):
    """The command on a machine with empty caches."""

    def run(*arguments, url="http://127.0.0.1:9", said=None):
        environment = {**os.environ, "HELIX_CACHE": str(tmp_path / "helix"), "HF_HOME": str(tmp_path / "hf")}
        environment |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "COLUMNS": "120"}
        command = [sys.executable, "-m", "helix_gateway", "models", *arguments]
        return subprocess.run(command, env=environment, input=said or "", capture_output=True, text=True, timeout=60)

    return run


def names_in(helix):
    return [entry["name"] for entry in json.loads(helix("list", "--json").stdout)]


def test_what_is_pulled_is_listed_shown_and_removed_when_the_user_says_so(helix, tmp_path, gguf):
    with HubServer({"org/tiny": FOLDER, "org/packed": {"only.gguf": gguf.read_bytes()}}) as hub:
        pulled = helix("pull", "org/tiny", url=hub.url)
        assert pulled.returncode == 0, pulled.stderr
        assert helix("pull", "org/packed", url=hub.url).returncode == 0
        assert not hub.downloads("pictures.bin")
    assert os.path.isfile(os.path.join(pulled.stdout.strip(), "model.safetensors"))
    table = helix("list").stdout
    assert "org/tiny" in table
    assert "org/packed/only.gguf" in table
    assert "2,048" in table
    shown = helix("show", "org/tiny").stdout
    assert "BF16" in shown
    assert "LlamaForCausalLM" in shown
    refused = helix("remove", "org/tiny", said="n\n")
    assert refused.returncode == 1
    assert names_in(helix) == ["org/packed/only.gguf", "org/tiny"]
    removed = helix("remove", "org/tiny", said="y\n")
    assert removed.returncode == 0
    assert "Removed org/tiny" in removed.stdout
    assert names_in(helix) == ["org/packed/only.gguf"]
    assert helix("remove", "org/packed", "--yes").returncode == 0
    assert names_in(helix) == []
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_an_empty_cache_says_how_to_fill_it(helix):
    assert "helix models pull" in helix("list").stdout


def test_the_default_model_is_listed_and_removed_as_any_other(helix, tmp_path, gguf):
    place = tmp_path / "helix" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    place.parent.mkdir(parents=True)
    gguf.rename(place)
    assert names_in(helix) == ["SmolLM2-135M-Instruct"]
    assert helix("remove", "smollm2-135m-instruct", "-y").returncode == 0
    assert not place.exists()


def test_a_damaged_model_is_named_and_hides_no_other(helix, tmp_path):
    broken = {"config.json": FOLDER["config.json"], "model.safetensors": b"rubbish, and not much of it"}
    with HubServer({"org/tiny": FOLDER, "org/broken": broken}) as hub:
        helix("pull", "org/tiny", url=hub.url)
        helix("pull", "org/broken", url=hub.url)
    listed = helix("list")
    assert listed.returncode == 0
    assert "2,048" in listed.stdout
    assert "org/broken: " in listed.stdout


@pytest.mark.parametrize("verb", ["show", "remove"])
def test_a_model_that_is_not_there_is_one_line(helix, verb):
    done = helix(verb, "org/none")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["helix: org/none is not in the cache, which holds: nothing."]


def test_a_gguf_file_tells_what_it_is(gguf):
    facts = read_facts(gguf)
    assert (facts.format, facts.weights, facts.architecture) == ("GGUF", "Q8_0", "llama")
    assert (facts.context_tokens, facts.parameters, facts.size_bytes) == (4096, 4 * 64 + 8, gguf.stat().st_size)


def folder_of(tmp_path, config):
    for name, content in FOLDER.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_tells_what_it_is(tmp_path):
    facts = read_facts(folder_of(tmp_path, CONFIG))
    assert (facts.format, facts.weights, facts.architecture) == ("safetensors", "BF16", "LlamaForCausalLM")
    assert (facts.context_tokens, facts.parameters) == (2048, 810)


def test_a_quantised_folder_is_named_after_its_method_and_counts_no_packed_weights(tmp_path):
    facts = read_facts(folder_of(tmp_path, {**CONFIG, "quantization_config": {"quant_method": "awq"}}))
    assert (facts.weights, facts.parameters) == ("awq", None)


def test_the_context_of_a_model_of_text_and_pictures_is_the_text_s(tmp_path):
    facts = read_facts(folder_of(tmp_path, {"model_type": "gemma3", "text_config": {"max_position_embeddings": 77}}))
    assert (facts.context_tokens, facts.architecture) == (77, "gemma3")


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, struct.pack("<Q", 4) + b"[1]\n", struct.pack("<Q", 2) + b"{"])
def test_a_broken_header_is_a_clear_error(tmp_path, content):
    folder_of(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match="no whole safetensors file"):
        read_facts(tmp_path)
