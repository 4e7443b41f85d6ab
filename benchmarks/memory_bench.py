"""How much of the KV memory holds tokens, and how many sequences fit beside one another, on the real model.

Two figures.  *Use*: with 32 requests of mixed lengths running at once, the share of all token slots in referenced
pages that hold a token, over all steps.  *Sequences*: the most sequences that run at once in the memory in which a
cache laid out for the full context of each would hold two.  Both are counts: how quick or busy the machine is
changes nothing but how long this takes (some 40,000 tokens are computed, three minutes on two quiet cores).  Nobody
drafts: sequences that end sooner would make room before the memory is full, and what drafts take for a step is given
back before it is counted.
"""

import argparse
import statistics
from pathlib import Path

import report

from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.runtime.model_source import resolve
from helix_gateway.service.api import GenerationCall
from helix_gateway.service.host import EngineHost
from helix_gateway.service.settings import EngineSettings

CONTEXT = 8192
CONTIGUOUS_SEQUENCES = 2
# Prompt tokens of the 32 requests: short questions, chats, and a few documents.
PROMPT_TOKENS = [40, 75, 120, 260, 33, 510, 90, 180, 64, 300, 47, 820, 150, 222, 28, 410] * 2
NEW_TOKENS = 128
"""Enough that all requests run at once for a while: a step computes a few hundred tokens of their prompts."""
BYTES_PER_TOKEN = {"auto": 30 * 2 * 3 * (64 + 4), "float32": 30 * 2 * 3 * 64 * 4, "bfloat16": 30 * 2 * 3 * 64 * 2}
"""Of keys and values of the default model; ``auto``: on a processor int8, with a scale a token and head."""


def submit(host, number, length):
    prompt = [1000 + (number * 7919 + i * 31) % 30000 for i in range(length)]
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    refused = host.submit(
        GenerationCall(request=Request(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
    )
    assert refused is None, refused


def run(settings, num_requests, advance):
    """Serve the requests; answer, for each step, sequences running and, while all run at once, the shares of slots in use."""
    host = EngineHost(settings)
    engine = host.engine
    for number in range(num_requests):
        submit(host, number, PROMPT_TOKENS[number % len(PROMPT_TOKENS)])
    running, use = [], []
    while host.has_work:
        ended = sum(event.finish_reason is not None for event in host.step())
        tables = [engine.cache.tables(sequence.key)[0] for sequence in engine.running]
        blocks = {block for table in tables for block in table.blocks}
        tokens = sum(sequence.num_computed_tokens for sequence in engine.running)
        running.append(len(tables))
        if len(tables) == min(num_requests, settings.max_num_seqs):
            use.append(tokens / (len(blocks) * settings.block_size))
        advance(ended)
    return running, use, engine.num_preemptions


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="float32", choices=BYTES_PER_TOKEN)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    path = resolve(options.model)
    roomy = EngineSettings(
        model_path=path,
        dtype=options.dtype,
        kv_cache_memory_bytes=2 << 30,
        enable_prefix_caching=False,
        speculation="off",
    )
    memory = CONTIGUOUS_SEQUENCES * CONTEXT * BYTES_PER_TOKEN[options.dtype]
    tight = EngineSettings(
        model_path=path,
        dtype=options.dtype,
        kv_cache_memory_bytes=memory,
        max_num_seqs=256,
        enable_prefix_caching=False,
        speculation="off",
    )
    with report.progress("Requests, roomy", len(PROMPT_TOKENS)) as advance:
        _, use, _ = run(roomy, len(PROMPT_TOKENS), advance)
    with report.progress("Requests, tight", 3 * len(PROMPT_TOKENS)) as advance:
        running, _, preemptions = run(tight, 3 * len(PROMPT_TOKENS), advance)
    assert use, "the requests never ran all at once"
    results = {
        "dtype": options.dtype,
        "use_median": statistics.median(use),
        "use_least": min(use),
        "use_steps": len(use),
        "contiguous_sequences": CONTIGUOUS_SEQUENCES,
        "paged_sequences_most": max(running),
        "ratio": max(running) / CONTIGUOUS_SEQUENCES,
        "preemptions": preemptions,
        "running": running,
    }
    rows = [
        ["share of KV slots in use that hold a token, 32 requests (median)", results["use_median"]],
        ["the same, least", results["use_least"]],
        [f"sequences in the memory of {CONTIGUOUS_SEQUENCES} contiguous contexts (most at once)", max(running)],
        ["ratio", results["ratio"]],
    ]
    report.print_table("KV memory", ["what", "figure"], rows)
    report.save("memory", results, lambda axes: draw(axes, running), folder=options.out)


def draw(axes, running):
    axes.plot(running, label="Helix")
    axes.axhline(CONTIGUOUS_SEQUENCES, color="grey", linestyle=":", label="a contiguous cache of full contexts")
    axes.set_xlabel("step")
    axes.set_ylabel("sequences running at once")
    axes.legend()


if __name__ == "__main__":
    main()
