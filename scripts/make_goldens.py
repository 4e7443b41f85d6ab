"""Writes what transformers' own ``generate`` answers greedily in float32: the reference that the tests hold Helix to.

    python scripts/make_goldens.py PROMPTS.jsonl

PROMPTS.jsonl has one object a line, with OpenAI's ``messages``.  The model is read by Helix's loader, and answered
by transformers alone, with its own attention and cache.  Where the reference's two best logits are close to each
other the position is recorded, since there the order of summation decides.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.progress import track

from helix_gateway.runtime.loading import load_model
from helix_gateway.runtime.model_source import resolve
from helix_gateway.text.tokenizer import Tokenizer

OUT = Path(__file__).resolve().parent.parent / "compat_tests" / "data" / "smollm2_greedy.json"
NUM_PROMPTS = 32
MAX_PROMPT_TOKENS = 900
NEW_TOKENS = 48
CLOSE = 1e-3


def choose_prompts(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of prompts spread evenly over the file, those too long for a quick test left out."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rendered = [tokenizer.render_chat(line["messages"][:1]) for line in lines]
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in rendered]
    short = [ids for ids in encoded if len(ids) <= MAX_PROMPT_TOKENS]
    return short[:: max(1, len(short) // NUM_PROMPTS)][:NUM_PROMPTS]


@torch.inference_mode()
def answer(model: torch.nn.Module, prompt: list[int], eos_token_ids: list[int]) -> dict[str, list[int]]:
    """The reference's greedy tokens, without EOS, and the positions where it was of two minds."""
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=eos_token_ids,
        pad_token_id=eos_token_ids[0],
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0, len(prompt) :].tolist()
    best = torch.stack(output.logits)[:, 0].topk(2).values
    close = ((best[:, 0] - best[:, 1]) < CLOSE).nonzero()[:, 0].tolist()
    kept = [token for token in tokens if token not in eos_token_ids]
    return {"prompt": prompt, "tokens": kept, "close": close}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path)
    path = resolve(None)
    tokenizer = Tokenizer.load(path)
    model = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
    prompts = choose_prompts(parser.parse_args().prompts, tokenizer)
    goldens = []
    for prompt in track(prompts, "Answering"):
        goldens.append(answer(model, prompt, list(tokenizer.eos_token_ids)))
    OUT.write_text(json.dumps({"new_tokens": NEW_TOKENS, "goldens": goldens}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
