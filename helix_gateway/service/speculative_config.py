"""``--speculative-config``: speculation in one JSON object, with the keys that other servers take.

    {"method": "draft_model", "model": "org/name", "num_speculative_tokens": 5}

Says the same as plain settings do, in other words; knows nothing about how anybody drafts.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from helix_gateway.core.errors import InvalidRequestError
from helix_gateway.service.settings import MAX_DEPTH

_METHODS: dict[str, Literal["model", "suffix"]] = {"draft_model": "model", "ngram": "suffix", "suffix": "suffix"}
_KEYS = ("method", "model", "num_speculative_tokens")


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the object said, in the words of the plain settings."""

    speculation: Literal["model", "suffix"]
    draft_model: str | None = None
    """As the user named it."""
    max_depth: int | None = None
    """None: not said."""


def read_speculative_config(given: str | Mapping[str, Any]) -> SpeculativeConfig:
    """Read the object, or the JSON of it.

    Raises:
        InvalidRequestError: naming the key that is wrong, and what it may be.
    """
    keys = _object(given)
    for key in keys:
        if key not in _KEYS:
            raise InvalidRequestError(f"has no key {key!r}: there are {_listed(_KEYS)}")
    model = _model(keys.get("model"))
    method = keys.get("method", None if model is None else "draft_model")
    if not isinstance(method, str) or method not in _METHODS:
        raise InvalidRequestError(f"method must be {_listed(_METHODS)}, not {json.dumps(method)}")
    speculation = _METHODS[method]
    if (model is not None) != (speculation == "model"):
        what = "needs a model" if speculation == "model" else "drafts without a model, so leave out model"
        raise InvalidRequestError(f'method "{method}" {what}')
    return SpeculativeConfig(
        speculation=speculation, draft_model=model, max_depth=_depth(keys.get("num_speculative_tokens"))
    )


def _object(given: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(given, str):
        return given
    try:
        keys = json.loads(given)
    except ValueError as error:
        raise InvalidRequestError(f"is no JSON: {error}") from None
    if not isinstance(keys, dict):
        raise InvalidRequestError('must be a JSON object, like {"method": "suffix"}')
    return keys


def _model(value: object) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise InvalidRequestError(f"model must be a GGUF file, a folder or a hub id, not {json.dumps(value)}")


def _depth(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_DEPTH:
        raise InvalidRequestError(f"num_speculative_tokens must be 1 to {MAX_DEPTH}, not {json.dumps(value)}")
    return value


def _listed(names: Any) -> str:
    *others, last = (f'"{name}"' for name in names)
    return f"{', '.join(others)} or {last}"
