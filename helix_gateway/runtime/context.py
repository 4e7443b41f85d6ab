"""How long a sequence of a model may grow and still be computed as the model was made to.

Knows nothing about memory or requests.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

# Rotary regimes in which every position's numbers change once a sequence passes the length that it was trained with.
_CHANGING_REGIMES = frozenset({"longrope", "dynamic"})


def context_length(config: PretrainedConfig) -> int:
    """Tokens that one sequence may have: the model's own bound.

    Under a rotary regime that changes with length it is the length up to which nothing changes: keys that lie in pages
    belong to one regime, and are shared among sequences of all lengths.
    """
    text = config.get_text_config()
    longest = int(text.max_position_embeddings)
    for rope in _rope_parameters(text):
        if rope.get("rope_type", rope.get("type")) in _CHANGING_REGIMES:
            original = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            longest = min(longest, int(original or longest))
    return longest


def _rope_parameters(config: PretrainedConfig) -> Iterator[Mapping[str, Any]]:
    """The rotary settings of a model, or those of each of its layer types."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    yield found
    yield from (value for value in found.values() if isinstance(value, Mapping))
