"""``helix version``: which Helix this is, and what of it decides what it can do."""

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import typer

from helix_gateway import __version__

_COMPANIONS = ("torch", "transformers", "numba")


def version() -> None:
    """Print the versions of Helix, Python and the libraries that matter most."""
    typer.echo(f"helix {__version__}")
    typer.echo(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _COMPANIONS:
        typer.echo(f"{name} {_version_of(name)}")


def print_version(asked: bool) -> None:
    """The callback of ``helix --version``: one line, and no more."""
    if asked:
        typer.echo(f"helix {__version__}")
        raise typer.Exit


def _version_of(name: str) -> str:
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return "not installed"
