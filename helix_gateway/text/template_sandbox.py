"""Jinja as chat templates are written for: the sandbox, filters, functions and tags that transformers gives them.

Our own, since importing transformers for it takes longer than all else that a gateway does before it answers; tests hold
what it writes to what transformers writes.  Knows nothing about messages.
"""

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


def compile_template(source: str) -> Template:
    """A template, ready to be rendered by any thread.

    Raises:
        jinja2.TemplateError: it is none.
    """
    template = _environment().from_string(source)
    # Jinja makes a chain of maps of them, and goes through it name by name in Python each time it renders.
    template.globals = dict(template.globals)
    return template


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_now, dict=_MakesDicts(), namespace=_OpenNamespace
    )
    return environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which looks no further where a template asks what it asks for with every message."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """``loop.first`` and its like hold numbers and messages: nothing that leads anywhere."""
        if type(obj) is LoopContext and attribute in _LOOP_FACTS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


_LOOP_FACTS = frozenset({"first", "last", "index", "index0", "revindex", "revindex0", "length", "previtem", "nextitem"})


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}``: what a model is trained to say, in a prompt text as any other."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, as transformers has it: what is set within it is not seen outside.
        return nodes.CallBlock(self.call_method("written"), [], [], body, lineno=line)

    @staticmethod
    def written(caller: Callable[[], str]) -> str:
        """The block's text."""
        return caller()


class _MakesDicts:
    """``dict`` without what a class of Python's leads to."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(keys, value)


class _OpenNamespace(Namespace):
    """``namespace`` without names that begin with an underscore, behind which Python keeps its own."""

    # No name of the first argument: a template may have a variable of any name.
    def __init__(*arguments: Any, **named: Any) -> None:
        own, *pairs = arguments
        for name in dict(*pairs, **named):
            _refuse_underscored(name)
        Namespace.__init__(own, *pairs, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscored(name)
        super().__setitem__(name, value)


def _refuse_underscored(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template has no {name!r}: names do not begin with an underscore")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(format: str) -> str:  # noqa: A002 - templates may name it
    return datetime.now().strftime(format)  # noqa: DTZ005 - the date where the server stands, as templates expect


def _to_json(
    x: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - as json has it
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Jinja's own would write ``<`` and its like for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
