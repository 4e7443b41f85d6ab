"""``helix serve --show-config``: what holds and where it was set, written as a TOML file that would set the same.

Knows nothing about what the settings do.
"""

import json
from collections.abc import Iterator

from helix_gateway.cli.options import default_text, value_text
from helix_gateway.cli.settings import ServeSettings, note
from helix_gateway.cli.sources import DEFAULT, Effective, usual_config_file

MASK = "********"


def show(effective: Effective) -> str:
    """All settings as lines of TOML, each with its origin; secrets are masked, and such lines are comments."""
    pairs = [(_line(effective, name), effective.origins[name]) for name in ServeSettings.model_fields]
    width = max(len(line) for line, _ in pairs)
    return "\n".join([*_head(effective), *(f"{line:<{width}}  # {origin}" for line, origin in pairs)])


def _head(effective: Effective) -> Iterator[str]:
    yield "# What `helix serve` would run with: flags before HELIX_… variables before the file before defaults."
    yield f"# File: {effective.file or f'none; usually {usual_config_file()}'}"


def _line(effective: Effective, name: str) -> str:
    value = getattr(effective.settings, name)
    if value is None or (value == [] and effective.origins[name] == DEFAULT):
        return f"# {name}: {default_text(name)}"
    if note(name, "secret"):
        return f"# {name} = {_toml([MASK] * len(value))}"
    return f"{name} = {_toml(value_text(name, value) if note(name, 'metavar') == 'SIZE' else value)}"


def _toml(value: object) -> str:
    """Strings, numbers, booleans and lists of them are written in TOML as in JSON."""
    return json.dumps(value, ensure_ascii=False)
