"""``helix models``: what lies in the caches of this machine, and how it gets there and away again.

Knows nothing about how models are fetched, found or read.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helix_gateway.core.errors import ModelLoadError

if TYPE_CHECKING:
    from helix_gateway.runtime.sources.cached import CachedModel
    from helix_gateway.runtime.sources.model_facts import ModelFacts

app = typer.Typer(
    name="models", help="The models on this machine.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)

_Json = Annotated[bool, typer.Option("--json", help="For programs.")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="As helix models list tells it.")]
_COLUMNS = ("size_bytes", "format", "weights", "context_tokens", "parameters")
_NOT_TOLD = "–"
_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


@app.command()
def pull(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="As for helix serve.  Left out: SmolLM2-135M-Instruct."),
    ] = None,
) -> None:
    """Download a model, so that it is there when it is wanted."""
    from helix_gateway.runtime.model_source import resolve

    typer.echo(resolve(model))


@app.command(name="list")
def list_models(as_json: _Json = False) -> None:
    """List what is here, with what it takes on the disk."""
    from helix_gateway.runtime.sources.cached import cached_models

    models = cached_models()
    if as_json:
        typer.echo(json.dumps([_record(model) for model in models], indent=1))
    elif models:
        _print_table(models)
    else:
        typer.echo("There are no models here yet; helix models pull gets one.")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As helix models list tells it, or a file or folder.")],
    as_json: _Json = False,
) -> None:
    """Tell what a model is, from its headers."""
    from helix_gateway.runtime.sources.cached import find, local_model

    path = Path(name).expanduser()
    found = [local_model(path)] if path.exists() else find(name)
    records = [_record(model) for model in found]
    if as_json:
        typer.echo(json.dumps(records, indent=1))
        return
    for record in records:
        for field, value in record.items():
            typer.echo(f"{field:15} {_as_text(field, value)}")


@app.command()
def remove(
    name: _Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model from the cache; of a hub's repository the whole snapshot, or all of them for org/name."""
    from helix_gateway.runtime.sources.cached import find, plan_removal

    removal = plan_removal(find(name))
    what = f"{', '.join(removal.names)} ({_size(removal.size_bytes)})"
    if not yes:
        typer.confirm(f"Remove {what}?", abort=True)
    removal.remove()
    typer.echo(f"Removed {what}.")


def _record(model: "CachedModel") -> dict[str, Any]:
    """What is known of a model, for people and programs alike; what does not apply is None."""
    return {"name": model.name, "path": str(model.path), "size_bytes": model.size_bytes, **_facts_of(model.facts)}


def _facts_of(read: "Callable[[], ModelFacts]") -> dict[str, Any]:
    """The facts, or what stands in the way of reading them: a damaged model must not hide the others."""
    try:
        facts = asdict(read())
    except ModelLoadError as error:
        return {"problem": str(error)}
    del facts["size_bytes"]
    return facts


def _print_table(models: "list[CachedModel]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "size", "format", "weights", "context", "parameters")
    for column in table.columns[1:]:
        column.no_wrap = True
        column.justify = "right"
    table.columns[0].overflow = "fold"
    problems = []
    for model in models:
        record = _record(model)
        problems += [f"{model.name}: {record['problem']}"] if "problem" in record else []
        cells = [_as_text(field, record.get(field)) for field in _COLUMNS]
        table.add_row(model.name, *cells)
    Console().print(table)
    for problem in problems:
        typer.echo(problem)


def _as_text(field: str, value: Any) -> str:
    if value is None:
        return _NOT_TOLD
    if field == "size_bytes":
        return _size(value)
    if field == "parameters":
        return _short(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(size_bytes: int) -> str:
    return _short(size_bytes) + "B"


def _short(number: int) -> str:
    """Three digits and a letter: 98.4 M."""
    for unit, letter in _UNITS:
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return f"{number} "
