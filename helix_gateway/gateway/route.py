"""What a route is: where it is called, who answers, and what clients may know of it.

`app.py` makes the router of these and `openapi.py` the document, so that neither knows a route that the other does
not.  Knows nothing about any one route.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp.typedefs import Handler

from helix_gateway.gateway.schemas.common import WireModel

JSON = "application/json"
EVENTS = "text/event-stream"
HTML = "text/html"
TEXT = "text/plain"
OPENMETRICS = "application/openmetrics-text"

PREFIX = "/v1"
"""People set ``base_url`` with and without it."""

Tag = Literal["OpenAI", "Helix", "Server"]

_pattern = re.compile(r"\{(\w+):[^}]*\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One way in which a route answers."""

    description: str
    status: int = 200
    schema: Any = None
    """A type of `schemas/answers.py`; None: no JSON.  Of a stream it is what each event holds."""
    media_type: str = JSON


@dataclass(frozen=True, slots=True)
class Example:
    """A request body that works as it stands where one model is served."""

    summary: str
    body: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One method of one path."""

    method: Literal["GET", "POST"]
    path: str
    """As people are told it; it answers with and without `PREFIX`, with and without a slash at the end."""
    handler: Handler
    tag: Tag
    summary: str
    """A few words."""
    open: bool = False
    """Whether it needs no key: it tells nothing of anybody's work, and probes have no keys."""
    description: str = ""
    request: type[WireModel] | None = None
    examples: tuple[Example, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Parts of the path, with what they are."""
    responses: tuple[Response, ...] = ()
    headers: tuple[str, ...] = ()
    """Response headers beside those that every response carries."""
    errors: tuple[int, ...] = ()
    """Statuses with OpenAI's error body, beside those that every route may answer."""

    @property
    def told_path(self) -> str:
        """The path as OpenAPI writes it: no patterns in its parts."""
        return _pattern.sub(r"{\1}", self.path)

    @property
    def spellings(self) -> list[str]:
        """Every path that the router knows it by."""
        bare = self.path.removeprefix(PREFIX).rstrip("/")
        paths = [bare, PREFIX + bare]
        if not _pattern.search(bare):
            paths += [path + "/" for path in paths]
        return [path for path in paths if path]


GENERATION_HEADERS = ("x-helix-seed", "x-helix-clamped", "x-helix-ignored-fields")
GENERATION_ERRORS = (400, 404, 413, 429, 503, 504)
