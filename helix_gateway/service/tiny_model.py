"""A model of a few thousand made-up weights, the same on every machine, for trying an engine out where there is no other.

A folder in Hugging Face layout: a Llama of two layers over bytes.  Its weights are the low bits of a linear
congruential generator, so they depend on no library's idea of randomness.
"""

import json
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

VOCAB_SIZE = 260
_HIDDEN, _FEED_FORWARD, _LAYERS, _HEADS, _KV_HEADS = 64, 128, 2, 4, 2
_HEAD_SIZE = _HIDDEN // _HEADS
# Knuth's MMIX generator; only its upper bits are used.
_FACTOR, _STEP = 6364136223846793005, 1442695040888963407

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": _HIDDEN,
    "intermediate_size": _FEED_FORWARD,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}

_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def write_tiny_model(folder: Path) -> Path:
    """Write the model into an empty folder, and return the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(_safetensors(_weights()))
    return folder


def _weights() -> dict[str, npt.NDArray[np.float32]]:
    shapes = {"model.embed_tokens.weight": (VOCAB_SIZE, _HIDDEN), "lm_head.weight": (VOCAB_SIZE, _HIDDEN)}
    for layer in range(_LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _LAYER_SHAPES.items()}
    state = 1
    weights = {}
    for name, shape in shapes.items():
        weights[name], state = _made_up(shape, state)
    norms = [f"model.layers.{layer}.{name}" for layer in range(_LAYERS) for name in _NORMS] + ["model.norm"]
    return weights | {f"{name}.weight": np.ones(_HIDDEN, dtype=np.float32) for name in norms}


_LAYER_SHAPES = {
    "self_attn.q_proj": (_HEADS * _HEAD_SIZE, _HIDDEN),
    "self_attn.k_proj": (_KV_HEADS * _HEAD_SIZE, _HIDDEN),
    "self_attn.v_proj": (_KV_HEADS * _HEAD_SIZE, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HEADS * _HEAD_SIZE),
    "mlp.gate_proj": (_FEED_FORWARD, _HIDDEN),
    "mlp.up_proj": (_FEED_FORWARD, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _FEED_FORWARD),
}
_NORMS = ("input_layernorm", "post_attention_layernorm")


def _made_up(shape: tuple[int, int], state: int) -> tuple[npt.NDArray[np.float32], int]:
    """Numbers between -0.5 and 0.5, and where the generator stands after them."""
    values = np.empty(shape[0] * shape[1], dtype=np.float32)
    for place in range(len(values)):
        state = (state * _FACTOR + _STEP) % 2**64
        values[place] = (state >> 40) / 2**24 - 0.5
    return values.reshape(shape), state


def _safetensors(tensors: dict[str, npt.NDArray[np.float32]]) -> bytes:
    header, data = {}, b""
    for name, values in tensors.items():
        raw = values.tobytes()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data
