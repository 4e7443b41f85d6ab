"""What requests say beside their prompts, remembered once it is checked: programs say the same with every prompt.

Checking some forty fields, nearly all of them absent, touches much memory, and a request that finds the gateway idle waits
for all of it.  Knows nothing about what the fields mean, and keeps neither prompts nor long fields.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

from pydantic import TypeAdapter

from helix_gateway.gateway.schemas.common import WireModel

MOST_KNOWN = 256
MOST_BYTES = 2048
"""Of one request's options; longer ones are seldom sent twice."""

Key = tuple[type[WireModel], tuple[tuple[str, bytes], ...]]
"""A schema, and the fields of a body but for its prompt, as they lay in it."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a request says beside its prompt, found right."""

    options: Any
    """The schema's object, with no prompt in it."""
    overlooked: Sequence[str]
    """Of its fields those that change nothing, by path: overruled ones, and unknown ones below others."""


class KnownOptions:
    """Checked options by how they lay in the body; safe to use from several threads."""

    def __init__(self) -> None:
        self._checked: dict[Key, Checked] = {}
        self._changes = Lock()
        """Held while options come and go; they are looked up without it, which one call of a dict does in one piece."""

    def find(self, key: Key) -> Checked | None:
        """Those options, where they are known."""
        return self._checked.get(key)

    def remember(self, key: Key, options: WireModel) -> Checked:
        """Take options that are right, and keep them if they are short; of too many the first are forgotten."""
        checked = Checked(options, (*options.overruled(), *options.unknown_below()))
        if sum(len(value) for _, value in key[1]) <= MOST_BYTES:
            self._keep(key, checked)
        return checked

    def _keep(self, key: Key, checked: Checked) -> None:
        with self._changes:
            if key not in self._checked and len(self._checked) >= MOST_KNOWN:
                del self._checked[next(iter(self._checked))]
            self._checked[key] = checked


def key_of(schema: type[WireModel], fields: Mapping[str, bytes]) -> Key:
    """What a body's options are known by."""
    return schema, tuple(item for item in fields.items() if item[0] != schema.prompt_field)


def checked_prompt(schema: type[WireModel], prompt: Any) -> Any:
    """The prompt's field alone, checked as the schema checks it.

    Raises:
        pydantic.ValidationError: it is not what it must be; the places that it names are below the field.
    """
    return _prompts(schema).validate_python(prompt)


@cache
def _prompts(schema: type[WireModel]) -> TypeAdapter[Any]:
    return TypeAdapter(schema.model_fields[schema.prompt_field].rebuild_annotation())
