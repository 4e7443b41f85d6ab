"""KV groups: which layers of a model share one block table, and the shape of what each layer stores.

Layers of equal KV heads, head dimensions and window form a group: one for a Llama, two for a Gemma, and more for each
further model that draws from the same pool.  Knows nothing about memory or devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores of each token, and how far back it looks."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    """A token attends to itself and the ``window - 1`` before it; None: to all before it."""


@dataclass(frozen=True, slots=True)
class LayerUse:
    """One attention layer: what it stores, and who asks."""

    shape: LayerShape
    heads: int
    """Query heads."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The layers of one shape in one model."""

    model: str
    """Tells the models of one pool apart: two of them never find each other's KV, however alike they are."""
    shape: LayerShape
    layers: tuple[int, ...]
    """By their place in the order in which the model calls them."""

    @property
    def name(self) -> str:
        """Unique among the groups of all models that share a pool."""
        shape = self.shape
        reach = "full" if shape.window is None else f"window{shape.window}"
        dims = str(shape.key_dim) if shape.key_dim == shape.value_dim else f"{shape.key_dim}+{shape.value_dim}"
        return f"{self.model}/{reach}-{shape.kv_heads}x{dims}"


def group_layers(model: str, shapes: Sequence[LayerShape]) -> tuple[LayerGroup, ...]:
    """The groups of one model, in the order of their first layer."""
    members: dict[LayerShape, list[int]] = {}
    for layer, shape in enumerate(shapes):
        members.setdefault(shape, []).append(layer)
    return tuple(LayerGroup(model, shape, tuple(layers)) for shape, layers in members.items())
