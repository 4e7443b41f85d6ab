"""What an engine is told when it starts; crosses from the gateway's process to the engine's as JSON.

Knows nothing about HTTP; the gateway's own settings (host, port, keys) are in `gateway/settings.py`.
"""

from typing import Literal

import msgspec

from helix_gateway.telemetry.settings import LogSettings

DTypeName = Literal["auto", "float32", "bfloat16"]
QuantizationName = Literal["auto", "int8", "int4", "none"]
KVDTypeName = Literal["auto", "int8", "bfloat16", "float32"]
DeviceName = Literal["auto", "cpu", "cuda", "directml", "mps", "xpu"]


MAX_DEPTH = 64
"""Most draft tokens of a sequence at a step that anybody may ask for."""
SpeculationName = Literal["auto", "off", "suffix", "model", "self"]


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One model, one device, one pool."""

    model_path: str
    """A GGUF file, or a folder in Hugging Face layout: always local, whatever the user named."""
    dtype: DTypeName = "auto"
    quantization: QuantizationName = "auto"
    """What a CPU holds weights in; "auto": a file's own blocks, else int8, where no dtype is asked for."""
    kv_cache_dtype: KVDTypeName = "auto"
    """auto: the dtype that is asked for; where none is, int8 beside quantised weights, else what weights are computed in."""
    device: DeviceName = "auto"
    max_model_len: int | None = None
    """None: the model's own context length, or what the pool holds if that is less."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    """Tokens computed in one step; None: what suits the device."""
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    """None: a share of what is free once the weights are loaded."""
    enable_prefix_caching: bool = True
    seed: int | None = None
    """Seeds of requests that bring none are drawn from this; None: from the system."""
    batch_window_ms: float = 0.0
    max_queue_len: int = 1024
    speculation: SpeculationName = "auto"
    """Who drafts: whoever there is, nobody, or only one: what is read off known text, the draft model, or the model itself
    at fewer bits."""
    draft_model_path: str | None = None
    """As ``model_path``; None: there is no draft model."""
    max_depth: int = 32
    """Most draft tokens of a sequence at a step."""
    min_depth: int = 0
    """Draft tokens verified at least, where there are as many: for those who test."""
    log: LogSettings = LogSettings()
