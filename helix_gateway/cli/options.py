"""The flags of `helix serve`, made from the fields of `ServeSettings`.

Flags carry strings: whatever the source of a value, pydantic reads it, so a wrong one is told in the same words.
Knows nothing about what a setting does.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from helix_gateway.cli.settings import ServeSettings, choices_of, note
from helix_gateway.cli.sizes import size_text

Command = Callable[..., None]

_BOUNDS = {Ge: ("at least", "ge"), Gt: ("more than", "gt"), Le: ("at most", "le"), Lt: ("less than", "lt")}


def with_flags(command: Command) -> Command:
    """Give a command that takes ``**values`` a flag for each setting, beside the parameters that it has itself.

    A flag that is not given is None, so that what was given can be told from a default.
    """
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    flags = [_parameter(name, field) for name, field in ServeSettings.model_fields.items()]
    # typer reads the flags off the signature.
    setattr(command, "__signature__", inspect.Signature([*flags, *own]))  # noqa: B010
    return command


def flag_of(name: str) -> str:
    """``max_model_len`` → ``--max-model-len``; the model is an argument."""
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=_option(name, field), annotation=_flag_type(field))


def _flag_type(field: FieldInfo) -> Any:
    if field.annotation is bool:
        return bool | None
    return list[str] | None if get_origin(field.annotation) is list else str | None


def _option(name: str, field: FieldInfo) -> Any:
    text = f"{field.description}  [default: {'; '.join([default_text(name), *bounds_of(name)])}]"
    if name == "model":
        return typer.Argument(None, metavar="MODEL", help=text)
    if field.annotation is bool:
        return typer.Option(None, f"{flag_of(name)}/--no-{flag_of(name)[2:]}", help=text)
    return typer.Option(None, flag_of(name), help=text, metavar=metavar(name))


def metavar(name: str) -> str:
    """How the help shows a value of a setting."""
    annotation = str(ServeSettings.model_fields[name].annotation)
    kind = "INTEGER" if "int" in annotation else "NUMBER" if "float" in annotation else "TEXT"
    return note(name, "metavar") or "|".join(choices_of(name)) or kind


def default_text(name: str) -> str:
    """What holds where a setting is not given, in words."""
    default = ServeSettings.model_fields[name].default
    if isinstance(default, bool):
        return "on" if default else "off"
    return note(name, "unset") or value_text(name, default)


def bounds_of(name: str) -> list[str]:
    """A setting's bounds, in words."""
    known = (
        (bound, _BOUNDS[type(bound)]) for bound in ServeSettings.model_fields[name].metadata if type(bound) in _BOUNDS
    )
    return [f"{words} {value_text(name, getattr(bound, key))}" for bound, (words, key) in known]


def value_text(name: str, value: object) -> str:
    """A value of a setting as a person would write it: sizes with their units."""
    if isinstance(value, int) and note(name, "metavar") == "SIZE":
        return size_text(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
