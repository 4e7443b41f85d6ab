"""Numbers as flags give them.  Knows nothing about what they are for."""

import math

import typer


def finite(value: float | None) -> float | None:
    """The value, where it is a number at all: ``nan`` passes every comparison with a bound."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number that can be used here.")
    return value
