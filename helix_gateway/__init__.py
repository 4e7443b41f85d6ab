"""Helix: an OpenAI-compatible server for transformers' language models.

The names below are the library's public face.  Each is imported when first asked for, so that
``import helix_gateway`` costs nothing and never loads torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helix_gateway.engine.block_table import SequenceBlockTable
    from helix_gateway.engine.decoder import AdaptiveSpeculativeDecoder
    from helix_gateway.engine.kv_cache import PagedKVCache
    from helix_gateway.engine.plan import SpeculativeOutput
    from helix_gateway.runtime.device import get_device
    from helix_gateway.service.helix_engine import GenerationResult, HelixEngine

__version__ = "0.1.0"

__all__ = [
    "AdaptiveSpeculativeDecoder",
    "GenerationResult",
    "HelixEngine",
    "PagedKVCache",
    "SequenceBlockTable",
    "SpeculativeOutput",
    "__version__",
    "get_device",
]

_HOMES = {
    "AdaptiveSpeculativeDecoder": "engine.decoder",
    "GenerationResult": "service.helix_engine",
    "HelixEngine": "service.helix_engine",
    "PagedKVCache": "engine.kv_cache",
    "SequenceBlockTable": "engine.block_table",
    "SpeculativeOutput": "engine.plan",
    "get_device": "runtime.device",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
