"""Makes models out of a target, as folders in Hugging Face layout: to test and measure speculation and quantisation.

    python scripts/make_draft_models.py OUT [--model MODEL] [--kind rounded|shallow|equal|other-tokenizer …]

``rounded`` has the target's weights rounded to 4 bits in groups, and is often right; ``shallow`` lacks its last ten layers,
and is seldom right; ``equal`` computes what the target computes, with other float32 numbers; ``other-tokenizer`` is a
small random model whose tokenizer knows half of the target's merges.  Tensors are written with safetensors, since
transformers does not save what it has read from a GGUF file.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from helix_gateway.runtime.loading import load_model
from helix_gateway.runtime.model_source import resolve
from helix_gateway.text.definition import TokenizerDefinition
from helix_gateway.text.gguf_tokenizer import load_gguf_tokenizer
from helix_gateway.text.huggingface_tokenizer import load_huggingface_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Tensors = dict[str, torch.Tensor]

GROUP = 64
"""Twice the groups of the 4-bit files that targets come from, whose own weights would not change otherwise."""
LEVELS = 15
"""Steps between the least and the largest weight of a group: 4 bits."""
LEFT_OUT = 10
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def round_to_four_bits(weight: torch.Tensor) -> torch.Tensor:
    """Each group of 64 weights of a row to the nearest of 16 values, spread evenly from its least to its largest."""
    groups = weight.float().reshape(-1, GROUP)
    least, largest = groups.aminmax(dim=1, keepdim=True)
    step = (largest - least).clamp(min=1e-12) / LEVELS
    rounded: torch.Tensor = (least + ((groups - least) / step).round() * step).reshape(weight.shape)
    return rounded


def tensors_of(model: "PreTrainedModel") -> Tensors:
    """The parameters, each once: a tied output embedding is the input's."""
    named = {name: tensor.detach().float().contiguous() for name, tensor in model.named_parameters()}
    return dict(sorted(named.items()))


def rounded(model: "PreTrainedModel") -> tuple["PreTrainedConfig", Tensors]:
    """The target at four bits."""
    tensors = tensors_of(model)
    divisible = {name for name, tensor in tensors.items() if tensor.dim() == 2 and tensor.shape[1] % GROUP == 0}
    return model.config, {
        name: round_to_four_bits(tensor) if name in divisible else tensor for name, tensor in tensors.items()
    }


def shallow(model: "PreTrainedModel") -> tuple["PreTrainedConfig", Tensors]:
    """The target without its last layers (of a model of few layers, without the last third)."""
    config = type(model.config).from_dict(model.config.to_dict())
    kept = config.num_hidden_layers - min(LEFT_OUT, config.num_hidden_layers // 3)
    config.num_hidden_layers = kept
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:kept]
    return config, {name: tensor for name, tensor in tensors_of(model).items() if _layer(name) < kept}


def equal(model: "PreTrainedModel") -> tuple["PreTrainedConfig", Tensors]:
    """The same function, but for float32's rounding, with its channels in another order; of a Llama without biases.

    The float32 numbers of a 4-bit file, rounded to four bits in the same groups, are that file again: they tell nothing
    about rounding a float model.  Here channels of the residual stream, of the MLP and of each head's values are
    exchanged at random, so that a group has numbers of 32 groups of the file, and lies on the grid of none.
    """
    tensors, dice, config = tensors_of(model), torch.Generator().manual_seed(1), model.config
    stream = torch.randperm(config.hidden_size, generator=dice)
    for name, tensor in tensors.items():
        writes_stream = name.endswith(("norm.weight", "o_proj.weight", "down_proj.weight"))
        tensors[name] = tensor[stream] if writes_stream else tensor[:, stream]
    for number in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{number}.self_attn.", f"model.layers.{number}.mlp."
        gated = torch.randperm(config.intermediate_size, generator=dice)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{mlp}{name}.weight"] = tensors[f"{mlp}{name}.weight"][gated]
        tensors[f"{mlp}down_proj.weight"] = tensors[f"{mlp}down_proj.weight"][:, gated]
        values = tensors[f"{attention}v_proj.weight"]
        dim = len(values) // config.num_key_value_heads
        order = torch.randperm(dim, generator=dice)
        for name, channels in (("v_proj", 0), ("o_proj", 1)):
            matrix = tensors[f"{attention}{name}.weight"]
            heads = dim * torch.arange(matrix.shape[channels] // dim)
            tensors[f"{attention}{name}.weight"] = matrix.index_select(channels, (heads[:, None] + order).reshape(-1))
    return config, {name: tensor.contiguous() for name, tensor in tensors.items()}


def _layer(name: str) -> int:
    """The number of the layer that a tensor belongs to; 0 where it belongs to none."""
    before, found, after = name.partition(".layers.")
    return int(after.partition(".")[0]) if found and before else 0


def small_random(vocab_size: int) -> tuple["PreTrainedConfig", Tensors]:
    """A Llama of a few thousand weights beside its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, max_position_embeddings=2048, **SMALL)
    return config, tensors_of(LlamaForCausalLM(config))


def with_half_the_merges(tokenizer_json: str) -> str:
    """A byte-level BPE tokenizer that has learned half as much: ids are other ids, and text is cut into more tokens."""
    definition = json.loads(tokenizer_json)
    model = definition["model"]
    merges = model["merges"][: len(model["merges"]) // 2]
    made = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1) for merge in merges}
    special = {token["content"] for token in definition["added_tokens"]}
    by_id = sorted(model["vocab"], key=model["vocab"].get)
    kept = [token for token in by_id if len(token) == 1 or token in made or token in special]
    model["vocab"] = {token: index for index, token in enumerate(kept)}
    model["merges"] = merges
    for token in definition["added_tokens"]:
        token["id"] = model["vocab"].setdefault(token["content"], len(model["vocab"]))
    return json.dumps(definition)


def write_folder(folder: Path, config: "PreTrainedConfig", tensors: Tensors) -> None:
    """Configuration and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = config.architectures or ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path, definition: TokenizerDefinition, tokenizer_json: str) -> None:
    """The tokenizer and its template, as a folder holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    spelt = {
        name: definition.special_tokens[name]
        for name in ("bos_token", "eos_token")
        if definition.special_tokens.get(name)
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **spelt}
    if isinstance(definition.chat_template, str):
        settings["chat_template"] = definition.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


KINDS: dict[str, Callable[["PreTrainedModel"], tuple["PreTrainedConfig", Tensors]]] = {
    "rounded": rounded,
    "shallow": shallow,
    "equal": equal,
}


def make_draft_models(model_path: str, out: Path, kinds: list[str]) -> Iterator[Path]:
    """Write draft models of some kinds; yields each one's folder.

    Args:
        model_path: the target, a GGUF file or a folder.
        out: where the folders go, each under its kind's name.
        kinds: of ``rounded``, ``shallow``, ``equal`` and ``other-tokenizer``.
    """
    is_folder = Path(model_path).is_dir()
    definition = load_huggingface_tokenizer(model_path) if is_folder else load_gguf_tokenizer(model_path)
    tokenizer_json = definition.backend.to_str()
    model = load_model(model_path, device=torch.device("cpu"), dtype=torch.float32)
    for kind in kinds:
        folder = out / kind
        if kind == "other-tokenizer":
            halved = with_half_the_merges(tokenizer_json)
            write_folder(folder, *small_random(len(json.loads(halved)["model"]["vocab"])))
            write_tokenizer(folder, definition, halved)
        else:
            write_folder(folder, *KINDS[kind](model))
            write_tokenizer(folder, definition, tokenizer_json)
        yield folder


def main() -> None:
    """Write the folders and name them."""
    names = [*KINDS, "other-tokenizer"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="as for helix serve; by default the default model")
    parser.add_argument("--kind", action="append", choices=names, help="may be given several times; by default all")
    options = parser.parse_args()
    for folder in make_draft_models(resolve(options.model), options.out, options.kind or names):
        print(folder)


if __name__ == "__main__":
    main()
