"""What steps of quantised and float32 models answer, as a last line of JSON: for comparing one kind of processor with another.

``python -m compat_tests.runtime.step_bits [MODEL …]``: greedy tokens, and a digest of all logits, of a tiny made-up model
in every arithmetic and of each MODEL as it is.  Whoever computes the tables of angles alike gets the very same bits.
Four bits are rounded without regard to a text: the moments of a layer's inputs are matrix products of torch's, whose last
bits differ from one kind of processor to another, and so would the weights.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from compat_tests.runtime.paged import Feeder
from helix_gateway.runtime import four_bit_model
from helix_gateway.runtime.factory import load_runner
from helix_gateway.service.tiny_model import write_tiny_model

MODES = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int8 over float32 pages": {"quantization": "int8", "kv_cache_dtype": "float32"},
    "float32": {"dtype": "float32", "quantization": "none"},
    "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
}
PROMPT_TOKENS, NEW_TOKENS = 45, 12


def rounded_once(function):
    """For tensors, in double precision: torch's own differs in a last bit from one processor to another."""
    return lambda tensor: torch.from_numpy(function(tensor.double().numpy())).to(tensor.dtype)


def answer(path, options):
    """Greedy tokens after a made-up prompt that is computed in chunks of 16, one prompt beside another."""
    runner = load_runner(path, device="cpu", max_tokens_in_use=1024, **options).runner
    dice = np.random.default_rng(0)
    prompts = [dice.integers(3, 250, count) for count in (PROMPT_TOKENS, PROMPT_TOKENS // 3)]
    feeder = Feeder(runner, [np.pad(prompt, (0, NEW_TOKENS)) for prompt in prompts])
    while any(feeder.done[i] < len(prompt) for i, prompt in enumerate(prompts)):
        left = [i for i, prompt in enumerate(prompts) if feeder.done[i] < len(prompt)]
        feeder.step([(i, feeder.done[i], min(feeder.done[i] + 16, len(prompts[i]))) for i in left])
    for _ in range(NEW_TOKENS):
        for i, tokens in enumerate(feeder.sequences):
            tokens[feeder.done[i]] = int(feeder.logits[i][-1][-1].argmax())
        feeder.step([(i, done, done + 1) for i, done in enumerate(feeder.done)])
    digest = hashlib.sha256(b"".join(part.float().numpy().tobytes() for each in feeder.logits for part in each))
    tokens = [sequence[-NEW_TOKENS:].tolist() for sequence in feeder.sequences]
    return {"tokens": tokens, "logits": digest.hexdigest()[:16]}


def main(models):
    torch.Tensor.cos, torch.Tensor.sin = rounded_once(np.cos), rounded_once(np.sin)
    four_bit_model.four_bits_of = lambda *_: None
    with tempfile.TemporaryDirectory() as folder:
        tiny = str(write_tiny_model(Path(folder)))
        answers = {f"a tiny model, {name}": answer(tiny, options) for name, options in MODES.items()}
    answers |= {os.path.basename(model): answer(model, {}) for model in models}
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1:])
