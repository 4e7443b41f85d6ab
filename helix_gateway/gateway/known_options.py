"""What requests say beside their prompts, remembered once it is checked: programs say the same with every prompt.

Checking some forty fields, nearly all of them absent, touches much memory, and a request that finds the gateway idle waits
for all of it.  Kept are the bytes of the known fields as they were sent and what they were found to be, in this process, until
`MOST_KNOWN` other sets of options have come since.  Never kept is a request's prompt, nor anything of a request that sends one
of its schema's `own_fields`, has unknown fields in others, or is longer than `MOST_BYTES`.  Knows nothing about what the
fields mean.
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
        """Take options that are right, and keep them if others may send the same; of too many the first are forgotten."""
        unknown = options.unknown_below()
        checked = Checked(options, (*options.overruled(), *unknown))
        if not unknown and _may_come_again(key):
            self._keep(key, checked)
        return checked

    def _keep(self, key: Key, checked: Checked) -> None:
        with self._changes:
            if key not in self._checked and len(self._checked) >= MOST_KNOWN:
                del self._checked[next(iter(self._checked))]
            self._checked[key] = checked


def _may_come_again(key: Key) -> bool:
    """Whether the options are short and none of them is one request's own; a null is as good as left out."""
    schema, fields = key
    if any(name in schema.own_fields and value != b"null" for name, value in fields):
        return False
    return sum(len(value) for _, value in fields) <= MOST_BYTES


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
