"""Activation functions whose rows do not notice one another.

torch walks an elementwise operator's numbers as one line, sixteen or thirty-two at a time, and takes another exponential
for the last few, which differs in the last bit.  Where a row is not a whole number of vectors, which of its numbers are
the last few depends on how many rows there are.  Rows of a whole number of vectors have no such rest.  Knows nothing
about models beyond their modules.
"""

import torch
from torch import nn
from transformers.activations import ACT2CLS

# Four AVX-512 vectors of float32, two of bfloat16: what torch computes in one go, at most.
_WHOLE = 64


class EvenRows(nn.Module):
    """An activation over rows widened to a multiple of 64 numbers, where they are not that already."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise, [..., width] to [..., width]."""
        width = x.shape[-1]
        if width % _WHOLE == 0:
            widened: torch.Tensor = self.activation(x)
            return widened
        padded: torch.Tensor = self.activation(nn.functional.pad(x, (0, -width % _WHOLE)))
        return padded[..., :width]


def keep_rows_apart(model: nn.Module) -> None:
    """Wrap every activation module of a model: those that transformers' ``ACT2FN`` makes, unless they have weights."""
    kinds = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in kinds and not isinstance(parent, EvenRows) and not list(child.parameters()):
                setattr(parent, name, EvenRows(child))
