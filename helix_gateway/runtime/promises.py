"""Matrices of a model that are not read with the rest of it: whoever wants one reads it, in whatever form it likes.

In the model such a matrix is a parameter of its shape whose numbers are all one and the same in memory, so a model of any
size is there at once and costs nothing.  What a parameter stands for is known by that memory.  Knows nothing about what
becomes of them.
"""

from torch import Tensor, float32, nn, zeros

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.checkpoints.protocol import StoredTensor


class NotQuantisableError(ModelLoadError):
    """A model's matrices cannot be read one by one; it can be served unquantised."""


class Promises:
    """The matrices that one model's parameters only stand for, in float32."""

    def __init__(self) -> None:
        self._stored: dict[int, tuple[StoredTensor, Tensor]] = {}

    def promise(self, stored: StoredTensor) -> Tensor:
        """What stands for a tensor: of its shape, and no memory to speak of."""
        number = zeros(1, dtype=float32)
        self._stored[number.data_ptr()] = (stored, number)
        return number.expand(stored.shape)

    def stored(self, parameter: Tensor) -> StoredTensor | None:
        """What a parameter stands for; None where it is a real one."""
        stored, _ = self._stored.get(parameter.untyped_storage().data_ptr(), (None, None))
        return stored

    def check(self, model: nn.Module) -> None:
        """Make sure that nobody has computed with what only stands for a matrix.

        Raises:
            NotQuantisableError: somebody has, so that numbers without meaning may be in the model.
        """
        there = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        if not self._stored.keys() <= there:
            raise NotQuantisableError(
                f"{type(model).__name__} cannot be quantised: transformers rearranges its weights as they are loaded. "
                "Load it with --quantization none."
            )

    def fulfil(self, model: nn.Module) -> None:
        """Read what is left of them into the model."""
        for parameter in model.parameters():
            stored = self.stored(parameter)
            if stored is not None:
                parameter.data = stored.read(float32)
