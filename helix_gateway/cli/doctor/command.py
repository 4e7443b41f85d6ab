"""``helix doctor``: look at everything, tell it, and exit with 1 where something is wrong.

Knows nothing about what is looked at.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from helix_gateway.service.findings import Finding

_MARKS = {"ok": "ok", "warning": "!!", "problem": "XX"}
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_NAME_WIDTH = 17

_Json = Annotated[bool, typer.Option("--json", help="Print the findings as JSON, for programs and for reports.")]
_Port = Annotated[int, typer.Option(min=1, max=65535, help="The port on which a server is to listen.")]
_SelfTest = Annotated[
    bool, typer.Option("--self-test/--no-self-test", help="Try an engine too, which takes about 20 seconds.")
]


def doctor(as_json: _Json = False, port: _Port = 8000, self_test: _SelfTest = True) -> None:
    """Tell what this machine has, try an engine on it, and say what to do about what is wrong."""
    found = []
    for finding in _examination(port, self_test):
        found.append(finding)
        if not as_json:
            _tell(finding)
    if as_json:
        _print_json(found)
    problems = sum(finding.state == "problem" for finding in found)
    warnings = sum(finding.state == "warning" for finding in found)
    if not as_json:
        typer.echo(f"\n{_count(problems, 'problem')}, {_count(warnings, 'warning')}.")
    raise typer.Exit(1 if problems else 0)


def _examination(port: int, self_test: bool) -> "Iterator[Finding]":
    from helix_gateway.cli.doctor.examination import examine_engine, examine_machine, examine_places

    yield from examine_machine()
    yield from examine_places(port)
    if self_test:
        with _waiting():
            yield from examine_engine()


def _waiting() -> "AbstractContextManager[object]":
    """Something that moves while the self-test runs, where a person watches."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status("Trying an engine") if console.is_terminal else contextlib.nullcontext()


def _tell(finding: "Finding") -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble(
        (_MARKS[finding.state], _STYLES[finding.state]), " ", (finding.name.ljust(_NAME_WIDTH), "bold"), finding.said
    )
    console = Console(soft_wrap=True)
    console.print(line)
    if finding.advice is not None:
        console.print(Text(" " * (_NAME_WIDTH + 3) + finding.advice, style="dim"))


def _print_json(found: "list[Finding]") -> None:
    import msgspec

    from helix_gateway import __version__

    report = {"helix": __version__, "findings": found}
    typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=1).decode())


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"
