"""KV groups: which layers of a model share one block table, and the shape of what each layer stores.

Layers of equal KV heads, head dimensions and window form a group: one for a Llama, two for a Gemma.  Knows nothing
about memory or devices.
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

    @property
    def elements_per_token(self) -> int:
        """Numbers stored of one token in one layer."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The layers of one shape, by their place in the order in which the model calls them."""

    name: str
    shape: LayerShape
    layers: tuple[int, ...]

    @property
    def elements_per_token(self) -> int:
        """Numbers stored of one token over all layers of the group."""
        return len(self.layers) * self.shape.elements_per_token


def group_layers(shapes: Sequence[LayerShape]) -> tuple[LayerGroup, ...]:
    """Groups in the order of their first layer."""
    members: dict[LayerShape, list[int]] = {}
    for layer, shape in enumerate(shapes):
        members.setdefault(shape, []).append(layer)
    return tuple(LayerGroup(_name(shape), shape, tuple(layers)) for shape, layers in members.items())


def _name(shape: LayerShape) -> str:
    reach = "full" if shape.window is None else f"window{shape.window}"
    dims = str(shape.key_dim) if shape.key_dim == shape.value_dim else f"{shape.key_dim}+{shape.value_dim}"
    return f"{reach}-{shape.kv_heads}x{dims}"
