"""What a command line that makes no sense is answered: one line, with the nearest option where one does not exist.

Knows typer's exceptions, and nothing about what commands do.
"""

import difflib
from typing import Any

import typer

# Of click, which newer versions of typer carry inside themselves: the class is had from one that typer exports.
WrongUsage: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for a command line that it cannot read; its ``exit_code`` is 2."""


def told(error: Any) -> str:
    """A `WrongUsage` in one line; the help, where a command was called with nothing at all."""
    message = str(error.format_message())
    if "\n" in message:
        return message
    context = error.ctx
    if context is None:
        return f"helix: {message}"
    if (name := getattr(error, "option_name", None)) and hasattr(error, "possibilities"):
        message = f"there is no option {name}{_nearest(name, context)}"
    return f"{context.command_path}: {message}"


def _nearest(name: str, context: Any) -> str:
    options = [each for parameter in context.command.get_params(context) for each in parameter.opts]
    near = difflib.get_close_matches(name, [each for each in options if each.startswith("--")], n=1)
    return f"; did you mean {near[0]}?" if near else f"; `{context.command_path} --help` names them."
