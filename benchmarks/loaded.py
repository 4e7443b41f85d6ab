"""What benchmarks of the engine alone begin with: threads as `helix serve` sets them, and the model's tokenizer and runner.

Knows nothing about what is measured.
"""

import os
import sys

from helix_gateway.runtime.cpu.threads import engine_environment
from helix_gateway.runtime.model_source import resolve


def in_engine_environment():
    """Start over with what `helix serve` sets for its engine's threads; they read it once, when they start."""
    if os.environ.get("HELIX_BENCH_CHILD"):
        return
    os.environ.update(engine_environment(), HELIX_BENCH_CHILD="1")
    os.execv(sys.executable, [sys.executable, *sys.argv])


def load(model, dtype, kv_cache_memory_bytes):
    """The tokenizer and the runner of a model, as `helix serve` takes it; None for the default one."""
    from helix_gateway.runtime.factory import load_runner
    from helix_gateway.text.tokenizer import Tokenizer

    path = resolve(model)
    loaded = load_runner(path, dtype=dtype, kv_cache_memory_bytes=kv_cache_memory_bytes, max_tokens_in_use=10**6)
    return Tokenizer.load(path), loaded.runner


def load_with_draft(model, draft_path, kv_cache_memory_bytes, **how):
    """The tokenizer, the loaded target and the loaded draft model over one pool; None for a draft where no path is."""
    from helix_gateway.runtime.factory import load_runners
    from helix_gateway.text.tokenizer import Tokenizer

    path = resolve(model)
    paths = [path] if draft_path is None else [path, draft_path]
    target, *drafts = load_runners(paths, kv_cache_memory_bytes=kv_cache_memory_bytes, max_tokens_in_use=10**6, **how)
    return Tokenizer.load(path), target, drafts[0] if drafts else None
