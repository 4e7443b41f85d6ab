"""Where the values of settings come from: flags first, then `HELIX_…` variables, then a TOML file, then defaults.

Each value keeps its origin, so that a wrong one is told by the name under which somebody wrote it.  Knows nothing
about what the settings do.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from helix_gateway.cli.options import flag_of
from helix_gateway.cli.settings import ServeSettings, note
from helix_gateway.core.errors import HelixError
from helix_gateway.gateway.keys import KeyFileError, read_key_file

PREFIX = "HELIX_"
CONFIG_VARIABLE = "HELIX_CONFIG"
DEFAULT = "default"
_SEVERAL_KEYS = "HELIX_API_KEYS"
"""As HELIX_API_KEY, but several, parted by commas."""


class SettingsError(HelixError):
    """Something that was set is wrong: one line for each, with its origin and its bound."""


class _Environment(ServeSettings, BaseSettings):
    """The same fields, for pydantic-settings to look for in the environment."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, enable_decoding=False, extra="ignore", protected_namespaces=()
    )


@dataclass(frozen=True, slots=True)
class Effective:
    """What holds, and where each value was set."""

    settings: ServeSettings
    origins: Mapping[str, str]
    """Field to flag, variable, or "file (key)"; `DEFAULT` where nobody set it."""
    file: Path | None
    doubts: list[str]
    """Variables that look like misspelt ones, a line each; Kubernetes and others may mean something by them."""


def effective(flags: Mapping[str, Any], config: str | None) -> Effective:
    """Merge all sources.

    Args:
        flags: the command line's values; None: not given.
        config: the TOML file that a flag names.

    Raises:
        SettingsError: a value, a key or the file is wrong.
    """
    file = _config_file(config)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for found in (_from_flags(flags), _from_environment(), _from_file(file)):
        for name, (value, origin) in found.items():
            values.setdefault(name, value)
            origins.setdefault(name, origin)
    try:
        settings = ServeSettings(**values)
    except ValidationError as error:
        raise SettingsError("\n".join(_problems(error, values, origins))) from None
    _check_key_file(settings, origins)
    return Effective(
        settings, {name: origins.get(name, DEFAULT) for name in ServeSettings.model_fields}, file, list(_doubts())
    )


Found = Mapping[str, tuple[Any, str]]
"""Field to value and origin."""


def _from_flags(flags: Mapping[str, Any]) -> Found:
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    return {name: (value, flag_of(name)) for name, value in given.items()}


def _from_environment() -> Found:
    read = EnvSettingsSource(_Environment)()
    found = {name: (value, f"{PREFIX}{name.upper()}") for name, value in read.items()}
    if several := os.environ.get(_SEVERAL_KEYS):
        keys = [key.strip() for key in several.split(",") if key.strip()]
        found.setdefault("api_key", (keys, _SEVERAL_KEYS))
    return found


def _doubts() -> Iterator[str]:
    known = {*(name.upper() for name in ServeSettings.model_fields), "CONFIG", "API_KEYS"}
    ours = (name.removeprefix(PREFIX) for name in os.environ if name.startswith(PREFIX))
    for name in sorted(set(ours) - known):
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
            yield f"{PREFIX}{name} is no variable of Helix; did you mean {PREFIX}{near[0]}?"


def _config_file(named: str | None) -> Path | None:
    """The file to read: the one named, or the one at the usual place, if there is one."""
    if named := named or os.environ.get(CONFIG_VARIABLE):
        return Path(named)
    if CONFIG_VARIABLE in os.environ:  # set to nothing: no file at all
        return None
    usual = usual_config_file()
    return usual if usual.is_file() else None


def usual_config_file() -> Path:
    """Where the user's configuration lies if nobody names another place."""
    return platformdirs.user_config_path("helix", appauthor=False) / "helix.toml"


def _from_file(path: Path | None) -> Found:
    if path is None:
        return {}
    found = {}
    for key, value in _read_toml(path).items():
        name = key.replace("-", "_")
        if name not in ServeSettings.model_fields:
            raise SettingsError(f"{path}: `{key}` is no setting of Helix{_nearest(name)}")
        found[name] = (value, f"{path}: `{key}`")
    return found


def _read_toml(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        raise SettingsError(f"{path} is a folder, not a TOML file.")
    if not path.exists():
        raise SettingsError(f"{path}: there is no such file.")
    try:
        return TomlConfigSettingsSource(_Environment, toml_file=path).toml_data
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # TOML's and UTF-8's errors are of this kind
        raise SettingsError(f"{path} is not valid TOML: {error}.") from None


def _check_key_file(settings: ServeSettings, origins: Mapping[str, str]) -> None:
    """Read it once: a server that takes minutes to load should not find out then."""
    if settings.api_key_file is not None:
        try:
            read_key_file(settings.api_key_file)
        except KeyFileError as error:
            raise SettingsError(f"{origins['api_key_file']}: {error}") from None


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, ServeSettings.model_fields, n=1)
    return f"; did you mean `{near[0]}`?" if near else "; `helix serve --help` names them."


def _problems(error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    from helix_gateway.gateway.errors import problem_of

    lines: dict[str, str] = {}
    for finding in error.errors(include_url=False):
        name = str(finding["loc"][0])
        hidden = note(name, "secret") and isinstance(finding["input"], str)  # of other types the type alone is told
        shown = {**finding, "input": "…"} if hidden else finding
        lines.setdefault(name, f"{origins[name]}: {problem_of(shown)}.{_hint(values[name])}")
    return list(lines.values())


def _hint(value: object) -> str:
    """Kubernetes sets such variables for every service; one that is called helix has them collide with ours."""
    if isinstance(value, str) and value.startswith("tcp://"):
        return " (Kubernetes sets it for a service called helix: set enableServiceLinks to false.)"
    return ""
